"""How the commands are used: the examples that the help of each ends with, and its manual page. Pure.

Tests run each line. A folder `images` is mounted at `disks`; vm is a disk in it, of which there is a snapshot monday.
"""

from __future__ import annotations

EXAMPLES = {
    "create": """\
fvdfs create images/empty.fvd 20G                                  # a disk without a template
fvdfs create images/web.fvd -b template.raw -F raw --copy-on-read  # on images/template.raw, of its size
fvdfs create images/fast.fvd 20G --data-file auto                  # its data is a raw file of its own""",
    "clone": """\
fvdfs clone images/template.raw web --into images                  # images/web.fvd
fvdfs clone template.qcow2 -F qcow2 vm -n 20 --into images         # images/vm-0001.fvd to images/vm-0020.fvd""",
    "info": """\
fvdfs info images/vm.fvd
fvdfs info --json images/vm.fvd""",
    "check": """\
fvdfs check images/vm.fvd                                          # writes nothing
fvdfs check --repair images/vm.fvd""",
    "amend": """\
fvdfs amend images/vm.fvd -F raw                                   # its base is a raw file, whatever it looks like""",
    "convert": """\
fvdfs convert template.qcow2 -f qcow2 images/new.fvd
fvdfs convert images/vm.fvd vm.qcow2
fvdfs convert images/vm.fvd small.qcow2 --compress
fvdfs convert images/vm.fvd images/small.fvd --compact
fvdfs convert images/vm.fvd - | gzip > vm.raw.gz                   # and back:
gunzip < vm.raw.gz | fvdfs convert - images/back.fvd""",
    "measure": """\
fvdfs measure images/vm.fvd --compact
fvdfs measure template.qcow2 -f qcow2 -O raw --json""",
    "compare": """\
fvdfs compare images/vm.fvd vm.raw
fvdfs compare -f qcow2 template.qcow2 images/template.raw || echo they differ""",
    "diff": """\
fvdfs diff images/vm.fvd --since monday
fvdfs diff images/vm.fvd@monday --json                             # all that the snapshot stores""",
    "export": """\
fvdfs export images/vm.fvd --since monday tuesday.qcow2 -b monday.qcow2 -F qcow2
fvdfs export images/vm.fvd --since monday vm-since-monday.fvd""",
    "restore": """\
fvdfs restore tuesday.fvd copy.fvd                                 # copy.fvd: the disk as it was on monday""",
    "mount": """\
fvdfs mount images disks
fvdfs mount images disks -o base_path=/srv,allow_url=nbd://10.0.0.1/
fvdfs mount images disks --read-only --log-file fvdfs.log""",
    "status": """\
fvdfs status disks
fvdfs status --json disks/vm.raw
fvdfs status --log disks""",
    "top": """\
fvdfs top disks""",
    "doctor": """\
fvdfs doctor
fvdfs doctor --json""",
    "prefetch": """\
fvdfs prefetch start disks/vm.raw
fvdfs prefetch pause disks/other.raw""",
    "profile": """\
fvdfs profile record images/vm.fvd                                 # at its next opening
fvdfs profile show images/vm.fvd > template.profile                # for fvdfs create --profile""",
    "map": """\
fvdfs map images/vm.fvd
fvdfs map disks/vm.raw --png vm.png
fvdfs map disks/vm.raw --html vm.html
fvdfs map --json disks/vm.raw""",
    "resize": """\
fvdfs resize disks/vm.raw +10G                                     # also while a machine runs
fvdfs resize images/other.fvd 2M --shrink""",
    "snapshot": """\
fvdfs snapshot disks/vm.raw before-upgrade                         # also while a machine runs
fvdfs snapshot images/other.fvd""",
    "delete": """\
fvdfs delete images/vm@monday.fvd
fvdfs delete disks/other@monday.raw                                # also while a machine runs""",
    "commit": """\
fvdfs commit images/vm.fvd""",
    "flatten": """\
fvdfs flatten disks/vm.raw                                         # also while a machine runs""",
    "rebase": """\
fvdfs rebase images/other.fvd -b other-template.raw                # what differs is copied
fvdfs rebase images/other.fvd -b /srv/template.raw --unsafe        # the base was moved there""",
    "revert": """\
fvdfs revert images/vm.fvd monday                                  # what was written since is lost""",
    "snapshots": """\
fvdfs snapshots images
fvdfs snapshots --json disks/vm.raw""",
    "serve": """\
fvdfs serve disks/vm.raw --listen 10.0.0.1                         # nbd://10.0.0.1/vm""",
    "receive": """\
fvdfs receive nbd://10.0.0.1/vm images/moved.fvd""",
    "migrate": """\
fvdfs migrate disks/vm.raw host-b:/srv/disks                       # a disk that no machine runs on
fvdfs migrate disks/vm.raw host-b:/srv/disks --qmp vm.qmp --qmp-target /run/vm.qmp""",
    "activate": """\
fvdfs activate disks/moved.raw""",
    "abandon": """\
fvdfs abandon disks/moved.raw""",
    "freeze": """\
fvdfs freeze disks/vm.raw""",
    "thaw": """\
fvdfs thaw disks/vm.raw""",
    "release": """\
fvdfs release disks/vm.raw""",
    "upgrade": """\
fvdfs upgrade disks                                                # after pip install --upgrade fvdfs, say
fvdfs upgrade disks -o prefetch_max=50M,allow_url=nbd://10.0.0.1/  # with other options from now on""",
    "umount": """\
fvdfs umount disks
fvdfs umount --lazy disks""",
}
