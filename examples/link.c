/* Hosts on one machine: network namespaces, joined by links with a rate and a delay, in user space. Needs root.
 *
 *     gcc -O2 -o link link.c
 *     ./link HOSTS BITS_PER_S DELAY_US [QUEUE_BYTES]
 *
 * Prints a line for each host, its address and its namespace, then "ready":
 *
 *     10.77.0.1 /proc/4711/fd/4
 *
 * `nsenter --net=/proc/4711/fd/4 COMMAND` runs a command there. Each host sends at most BITS_PER_S (what does not fit in a
 * queue of QUEUE_BYTES, 1 MiB by default, is lost), and a frame needs DELAY_US to any other host.
 * Reads commands, a line each, and answers each with a line:
 *
 *     cut [N]     nothing comes from host N (1, 2, ...; default: all), or to it, any more
 *     join [N]    it is there again
 *     bytes       what each host has sent that arrived: bytes of frames, a large one (TSO) with one header
 *
 * At the end of its input it ends, and the namespaces with it, once nothing runs in them. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if_ether.h>
#include <linux/if_tun.h>
#include <linux/virtio_net.h>
#include <net/if.h>
#include <net/if_arp.h>
#include <poll.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MOST_HOSTS 8
#define SLOTS 4096               /* frames on their way from a host */
#define LARGEST (65536 + 128)    /* bytes of a frame with its virtio_net_hdr */
#define BESIDE_FRAME 24          /* bytes that the wire carries with a frame: preamble, checksum, gap */
#define TCP_HEADERS 66           /* bytes: Ethernet, IPv4, TCP with timestamps */

struct frame { int64_t due; int size; char *data; };
struct host {
    int tap, is_cut;
    struct frame ring[SLOTS];
    unsigned head, tail;
    long queued;                 /* bytes */
    int64_t free_at;             /* when all that is queued has left, ns */
    long arrived;                /* bytes that others got from it */
};
static struct host hosts[MOST_HOSTS];
static int count;

static void must(int ok, const char *what)
{
    if (!ok) { perror(what); exit(1); }
}

static int64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void bring_up(int control, struct ifreq *request)
{
    request->ifr_flags = IFF_UP;
    must(!ioctl(control, SIOCSIFFLAGS, request), "SIOCSIFFLAGS");
}

/* A namespace with `lo` and `link0`; the last byte of its hardware address says which host a frame is for. */
static void make_host(int number)
{
    struct ifreq loopback = {.ifr_name = "lo"}, link = {.ifr_name = "link0"};
    struct sockaddr_in *address = (struct sockaddr_in *)&link.ifr_addr;
    char text[INET_ADDRSTRLEN];
    must(!unshare(CLONE_NEWNET), "a network namespace");
    int namespace = open("/proc/self/ns/net", O_RDONLY), control = socket(AF_INET, SOCK_DGRAM, 0);
    must(namespace >= 0 && control >= 0, "a network namespace");
    bring_up(control, &loopback);
    int tap = hosts[number - 1].tap = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
    must(tap >= 0, "/dev/net/tun");
    link.ifr_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;
    must(!ioctl(tap, TUNSETIFF, &link), "TUNSETIFF");
    must(!ioctl(tap, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4), "TUNSETOFFLOAD"); /* else a gigabit keeps a CPU busy */
    link.ifr_hwaddr.sa_family = ARPHRD_ETHER;
    memcpy(link.ifr_hwaddr.sa_data, (char[6]){2, 0, 0, 0, 0, number}, 6);
    must(!ioctl(control, SIOCSIFHWADDR, &link), "SIOCSIFHWADDR");
    memset(address, 0, sizeof *address);
    address->sin_family = AF_INET;
    address->sin_addr.s_addr = htonl(0x0a4d0000 + number);
    inet_ntop(AF_INET, &address->sin_addr, text, sizeof text);
    must(!ioctl(control, SIOCSIFADDR, &link), "SIOCSIFADDR");
    address->sin_addr.s_addr = htonl(0xffffff00);
    must(!ioctl(control, SIOCSIFNETMASK, &link), "SIOCSIFNETMASK");
    bring_up(control, &link);
    close(control);
    printf("%s /proc/%d/fd/%d\n", text, getpid(), namespace);
}

/* Bytes that the wire carries for a frame. A large one goes in segments, each with the headers and what is beside it. */
static long on_the_wire(const struct frame *frame)
{
    const struct virtio_net_hdr *header = (const void *)frame->data;
    long size = frame->size - sizeof *header, segments = 1;
    if (header->gso_type != VIRTIO_NET_HDR_GSO_NONE && header->gso_size)
        segments = (size - TCP_HEADERS + header->gso_size - 1) / header->gso_size;
    return size + segments * BESIDE_FRAME + (segments - 1) * TCP_HEADERS;
}

static void deliver(struct host *from, const struct frame *frame)
{
    const struct ethhdr *ethernet = (const void *)(frame->data + sizeof(struct virtio_net_hdr));
    int is_for_all = ethernet->h_dest[0] & 1;
    for (int i = 0; i < count; i++) {
        struct host *to = &hosts[i];
        if (to == from || (!is_for_all && ethernet->h_dest[5] != i + 1) || from->is_cut || to->is_cut) continue;
        if (write(to->tap, frame->data, frame->size) == frame->size)
            from->arrived += frame->size - sizeof(struct virtio_net_hdr);
    }
}

/* Deliver what is due; when the next frame is, INT64_MAX: none is on its way. */
static int64_t deliver_due(struct host *from)
{
    for (int64_t t = now(); from->tail != from->head; from->tail++) {
        struct frame *frame = &from->ring[from->tail % SLOTS];
        if (frame->due > t) return frame->due;
        deliver(from, frame);
        from->queued -= frame->size;
    }
    return INT64_MAX;
}

static void take(struct host *from, double bytes_per_ns, int64_t delay, long limit)
{
    for (int taken = 0; taken < 32; taken++) { /* then the others have their turn */
        struct frame *frame = &from->ring[from->head % SLOTS];
        if (!frame->data) must((frame->data = malloc(LARGEST)) != NULL, "memory");
        if ((frame->size = read(from->tap, frame->data, LARGEST)) <= 0) return;
        const struct ethhdr *ethernet = (const void *)(frame->data + sizeof(struct virtio_net_hdr));
        if (ethernet->h_proto == htons(ETH_P_IPV6)) continue; /* hosts look for neighbours by it, which would count */
        if (from->queued + frame->size > limit || from->head - from->tail >= SLOTS - 1) continue;
        int64_t t = now();
        if (from->free_at < t) from->free_at = t;
        from->free_at += on_the_wire(frame) / bytes_per_ns;
        frame->due = from->free_at + delay;
        from->queued += frame->size;
        from->head++;
    }
}

static void obey(const char *line)
{
    char word[16] = "";
    int number = 0;
    sscanf(line, "%15s %d", word, &number);
    if (!strcmp(word, "cut") || !strcmp(word, "join")) {
        for (int i = 0; i < count; i++)
            if (number == 0 || number == i + 1) hosts[i].is_cut = !strcmp(word, "cut");
        puts("ok");
    } else if (!strcmp(word, "bytes")) {
        for (int i = 0; i < count; i++) printf("%ld%c", hosts[i].arrived, i == count - 1 ? '\n' : ' ');
    } else {
        puts("cut [N], join [N] or bytes");
    }
}

/* Obey the lines that have come; 0: there will be no more. */
static int read_commands(void)
{
    static char text[256];
    static int length;
    int size = read(0, text + length, sizeof text - 1 - length);
    if (size <= 0) return 0;
    length += size;
    text[length] = 0;
    for (char *end; (end = strchr(text, '\n')); length -= end + 1 - text, memmove(text, end + 1, length + 1)) {
        *end = 0;
        obey(text);
    }
    return length < (int)sizeof text - 1;
}

int main(int argc, char **argv)
{
    if (argc < 4 || (count = atoi(argv[1])) < 2 || count > MOST_HOSTS || atof(argv[2]) <= 0) {
        fprintf(stderr, "usage: link HOSTS BITS_PER_S DELAY_US [QUEUE_BYTES]; 2 to %d hosts\n", MOST_HOSTS);
        return 2;
    }
    double bytes_per_ns = atof(argv[2]) / 8e9;
    int64_t delay = atoll(argv[3]) * 1000;
    long limit = argc > 4 ? atol(argv[4]) : 1 << 20;
    setvbuf(stdout, NULL, _IOLBF, 0);
    prctl(PR_SET_TIMERSLACK, 1000);
    int here = open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC);
    for (int i = 0; i < count; i++) make_host(i + 1);
    must(!setns(here, CLONE_NEWNET), "the network namespace of before"); /* what runs in a host's is the host's */
    puts("ready");
    for (;;) {
        struct pollfd polled[MOST_HOSTS + 1] = {{.fd = 0, .events = POLLIN}};
        int64_t next = INT64_MAX;
        for (int i = 0; i < count; i++) {
            int64_t due = deliver_due(&hosts[i]);
            if (due < next) next = due;
            polled[i + 1] = (struct pollfd){.fd = hosts[i].tap, .events = POLLIN};
        }
        int64_t left = next == INT64_MAX ? 0 : next - now();
        if (left < 0) left = 0;
        struct timespec wait = {left / 1000000000, left % 1000000000};
        must(ppoll(polled, count + 1, next == INT64_MAX ? NULL : &wait, NULL) >= 0 || errno == EINTR, "ppoll");
        for (int i = 0; i < count; i++)
            if (polled[i + 1].revents & POLLIN) take(&hosts[i], bytes_per_ns, delay, limit);
        if (polled[0].revents && !read_commands()) return 0;
    }
}
