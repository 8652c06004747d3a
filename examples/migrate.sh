#!/bin/sh
# A running machine moves to another host at once, and its disk follows: one command, in a minute.
# The hosts are two network namespaces of this machine, joined by a link of 1 Gbit/s and half a millisecond (link.c).
# Needs root, on Debian 12; installs what is missing, works in a temporary folder, and removes what it has made.
set -eu
here=$(cd "$(dirname "$0")/.." && pwd)
[ "$(id -u)" = 0 ] || { echo "run this as root: it makes network namespaces" >&2; exit 1; }
venv=${FVDFS_VENV:-$here/.venv}
sh "$here/examples/install.sh" "$venv" libc6-dev qemu-system-x86 qemu-system-common busybox-static cpio kmod \
    linux-image-cloud-amd64
PATH=$venv/bin:$PATH
megabytes=${MEGABYTES:-512}

work=$(mktemp -d -t fvdfs-migrate-XXXXXX)
clean_up() {
    exec 3>&-
    for file in "$work"/*.pid; do
        [ ! -e "$file" ] || kill "$(cat "$file")" 2>/dev/null || true
    done
    for host in src dst; do
        for try in 1 2 3 4 5 6 7 8 9 10; do
            fvdfs umount "$work/$host/disks" 2>/dev/null && break
            sleep 0.3
        done
    done
    [ -z "${link:-}" ] || kill "$link" 2>/dev/null || true
    rm -rf "$work"
}
trap clean_up EXIT
trap 'exit 130' INT TERM HUP
say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
cd "$work"

# --- a guest: Debian's kernel, busybox, and a script that tells what it does, twice a second ---

kernel=$(ls -t /boot/vmlinuz-*-cloud-amd64 | head -1)
version=${kernel#/boot/vmlinuz-}
mkdir -p guest/bin guest/modules src/images src/disks dst/images dst/disks
cp "$(command -v busybox)" guest/bin/busybox
number=100
for module in virtio_pci virtio_blk; do
    for file in $(modprobe -S "$version" --show-depends "$module" | sed -n 's/^insmod //p'); do
        number=$((number + 1))
        case $file in
        *.xz) xz -dc "$file" >"guest/modules/$number.ko" ;;
        *) cp "$file" "guest/modules/$number.ko" ;;
        esac
    done
done
cat >guest/init <<EOF
#!/bin/busybox sh
/bin/busybox mkdir -p /dev /proc
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
for module in /modules/*; do insmod \$module 2>/dev/null; done
while [ ! -b /dev/vda ]; do sleep 0.1; done
tick=0
while :; do
    tick=\$((tick + 1))
    at=\$((tick * 61 % $megabytes))
    echo "tick \$tick" | dd of=/dev/vda bs=512 seek=\$(($megabytes * 2048 + tick)) conv=sync,fsync 2>/dev/null || echo "WRITE FAILED"
    dd if=/dev/vda of=/dev/null bs=1M skip=\$at count=1 2>/dev/null || echo "READ FAILED"
    echo "tick \$tick: a record written, and 1 MiB read at \$at MiB"
    sleep 0.5
done
EOF
chmod +x guest/init
(cd guest && find . | cpio --quiet -o -H newc -R 0:0 >../initrd)

# --- two hosts, a disk on the first, and the machine that has it ---

gcc -O2 -o linked "$here/examples/link.c"
mkfifo hold
./linked 2 1e9 500 <hold >linked.out &
link=$!
exec 3>hold # the link ends with this
until grep -q ready linked.out; do sleep 0.1; done
address() { sed -n "$1p" linked.out | cut -d ' ' -f 1; }
src() { nsenter --net="$(sed -n 1p linked.out | cut -d ' ' -f 2)" "$@"; }
to_dst="nsenter --net=$(sed -n 2p linked.out | cut -d ' ' -f 2)"
machine() { # HOST: QEMU's command line of the machine there
    echo "qemu-system-x86_64 -accel tcg -cpu qemu64 -m 256 -nodefaults -display none -daemonize" \
        "-kernel $kernel -initrd $work/initrd -append 'console=ttyS0 quiet no_timer_check'" \
        "-drive file=$work/$1/disks/vm.raw,format=raw,if=virtio,cache=none -serial file:$work/$1.console" \
        "-qmp unix:$work/$1.qmp,server=on,wait=off -pidfile $work/$1.pid"
}

say "On the source, $(address 1): a disk of 20 GiB, $megabytes MiB of it random data, and a machine that uses it"
fvdfs create src/images/vm.fvd 20G
src fvdfs mount src/images src/disks
dd if=/dev/urandom of=src/disks/vm.raw bs=1M count="$megabytes" conv=notrunc,fsync status=none
before=$(head -c "${megabytes}M" src/disks/vm.raw | sha256sum)
du -h src/images/vm.fvd
touch src.console dst.console
eval "src $(machine src)"
tail -q -n +1 -f src.console 3>&- | sed -u 's/^/                            guest at src: /' &
tails=$!
until grep -q "tick 6:" src.console; do sleep 0.2; done

say "On the target, $(address 2): a mount that allows the source"
$to_dst "$venv/bin/fvdfs" mount dst/images dst/disks -o "allow_url=nbd://$(address 1)/"
tail -q -n +1 -f dst.console 3>&- | sed -u 's/^/                            guest at dst: /' &
tails="$tails $!"

say "One command"
set -- src/disks/vm.raw "$(address 2):$work/dst/disks" --qmp src.qmp --qmp-target "$work/dst.qmp"
echo "$ fvdfs migrate $* --start 'qemu-system-x86_64 ... -incoming defer'"
src "$venv/bin/fvdfs" migrate "$@" --ssh "$to_dst" --program "$venv/bin/fvdfs" --start "$(machine dst) -incoming defer"

say "All of it is at the target; the source is switched off"
fvdfs umount src/disks
ticks() { grep -c '^tick' "$1" || true; }
last=$(ticks dst.console)
until [ "$(ticks dst.console)" -ge $((last + 3)) ]; do sleep 0.2; done
# shellcheck disable=SC2086
kill $tails 2>/dev/null || true
kill "$(cat dst.pid)"
rm -f dst.pid  # QEMU may have removed it by now

say "What was seen"
cat src.console dst.console | tr -d '\r' >console
if grep FAILED console; then exit 1; fi
count=$(grep -c '^tick' console)
sed -n 's/^tick \([0-9]*\):.*/\1/p' console | awk '$1 != NR { print "a tick is missing before " $1; exit 1 }'
echo "the guest ticked $count times without a gap, $(ticks src.console) of them here and the others there"
until fvdfs umount dst/disks 2>/dev/null; do sleep 0.2; done
$to_dst "$venv/bin/fvdfs" mount dst/images dst/disks
records=$(tail -c +$((megabytes * 1048576 + 513)) dst/disks/vm.raw | head -c $((count * 512)) | tr -d '\0')
[ "$records" = "$(seq -f 'tick %.0f' "$count")" ] || { echo "records are missing on its disk"; exit 1; }
echo "its disk at the target has all $count records"
[ "$(head -c "${megabytes}M" dst/disks/vm.raw | sha256sum)" = "$before" ] || { echo "its data is not the same"; exit 1; }
echo "its $megabytes MiB of data are the same, and none of it comes from the source any more:"
du -h dst/images/vm.fvd
fvdfs status dst/disks
