/* A switch with long cables: carries IPv4 packets between the TUN devices of several network namespaces,
 * each packet delayed by the propagation time and each sender held to a rate.
 *
 *   delay_switch DELAY_NS BYTES_PER_S PID...
 *
 * The namespace of process PID number k must hold a TUN device eth0 with the address 10.77.0.(k+1). A rate of
 * 0 means unlimited. Prints "up" when packets flow. A sender's queue holds 8 MB; what does not fit is lost. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

enum { MAX_PORTS = 64, MAX_PACKET = 65536, READS_PER_TURN = 64, TIMER = MAX_PORTS };
static const uint64_t QUEUE_BYTES = 8u << 20, NS_PER_S = 1000000000u, SLACK_NS = 2000;

struct packet {
  struct packet *next;
  uint64_t due_ns;
  int port, length;
  unsigned char bytes[];
};

/* One sender: its device, when its link is free again, and its packets in order of arrival. */
struct port {
  int fd;
  uint64_t free_ns;
  struct packet *head, *tail;
};

static struct port ports[MAX_PORTS];
static int num_ports;
static uint64_t delay_ns, bytes_per_s;

static void die(const char *what) {
  perror(what);
  exit(1);
}

static uint64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (uint64_t)t.tv_sec * NS_PER_S + (uint64_t)t.tv_nsec;
}

static int open_device(const char *pid) {
  char path[64];
  snprintf(path, sizeof path, "/proc/%s/ns/net", pid);
  int space = open(path, O_RDONLY | O_CLOEXEC);
  if (space < 0 || setns(space, CLONE_NEWNET)) die(path);
  close(space);
  int fd = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
  if (fd < 0) die("/dev/net/tun");
  struct ifreq request = {.ifr_flags = IFF_TUN | IFF_NO_PI};
  strcpy(request.ifr_name, "eth0");
  if (ioctl(fd, TUNSETIFF, &request)) die("TUNSETIFF");
  return fd;
}

/* The port that a packet goes to, or -1: IPv4 within 10.77.0.0/24 only. */
static int destination(const unsigned char *bytes, int length) {
  if (length < 20 || bytes[0] >> 4 != 4) return -1;
  if (bytes[16] != 10 || bytes[17] != 77 || bytes[18] != 0) return -1;
  int port = bytes[19] - 1;
  return port >= 0 && port < num_ports ? port : -1;
}

static void receive(struct port *from) {
  static unsigned char buffer[MAX_PACKET];
  for (int i = 0; i < READS_PER_TURN; ++i) {
    int length = (int)read(from->fd, buffer, sizeof buffer);
    if (length <= 0) return;
    int to = destination(buffer, length);
    if (to < 0) continue;
    uint64_t leaves = now_ns();
    if (bytes_per_s) {
      if (from->free_ns > leaves) {
        if ((from->free_ns - leaves) * bytes_per_s / NS_PER_S > QUEUE_BYTES) continue;
        leaves = from->free_ns;
      }
      leaves += (uint64_t)length * NS_PER_S / bytes_per_s;
      from->free_ns = leaves;
    }
    struct packet *p = malloc(sizeof *p + (size_t)length);
    if (!p) die("malloc");
    *p = (struct packet){.due_ns = leaves + delay_ns, .port = to, .length = length};
    memcpy(p->bytes, buffer, (size_t)length);
    if (from->tail) from->tail->next = p;
    else from->head = p;
    from->tail = p;
  }
}

/* Hands over what is due; returns when the next packet of this sender is, or UINT64_MAX. */
static uint64_t deliver(struct port *from, uint64_t now) {
  while (from->head && from->head->due_ns <= now + SLACK_NS) {
    struct packet *p = from->head;
    if (write(ports[p->port].fd, p->bytes, (size_t)p->length) < 0 && errno != EAGAIN && errno != EIO)
      perror("write"); /* EIO: the device is down, as after a pulled cable */
    from->head = p->next;
    if (!from->head) from->tail = NULL;
    free(p);
  }
  return from->head ? from->head->due_ns : UINT64_MAX;
}

int main(int argc, char **argv) {
  if (argc < 4 || argc - 3 > MAX_PORTS) {
    fprintf(stderr, "usage: delay_switch DELAY_NS BYTES_PER_S PID...\n");
    return 2;
  }
  delay_ns = strtoull(argv[1], NULL, 10);
  bytes_per_s = strtoull(argv[2], NULL, 10);
  num_ports = argc - 3;
  int poller = epoll_create1(EPOLL_CLOEXEC), timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
  if (poller < 0 || timer < 0) die("epoll or timerfd");
  for (int k = 0; k <= num_ports; ++k) {
    struct epoll_event event = {.events = EPOLLIN, .data.u32 = k < num_ports ? (uint32_t)k : TIMER};
    if (k < num_ports) ports[k].fd = open_device(argv[3 + k]);
    if (epoll_ctl(poller, EPOLL_CTL_ADD, k < num_ports ? ports[k].fd : timer, &event)) die("epoll_ctl");
  }
  puts("up");
  fflush(stdout);
  for (;;) {
    struct epoll_event events[MAX_PORTS + 1];
    int n = epoll_wait(poller, events, MAX_PORTS + 1, 1000);
    for (int i = 0; i < n; ++i) {
      uint64_t expirations;
      if (events[i].data.u32 != TIMER) receive(&ports[events[i].data.u32]);
      else if (read(timer, &expirations, sizeof expirations) < 0 && errno != EAGAIN) die("timer");
    }
    uint64_t now = now_ns(), next = UINT64_MAX;
    for (int k = 0; k < num_ports; ++k) {
      uint64_t due = deliver(&ports[k], now);
      if (due < next) next = due;
    }
    if (next != UINT64_MAX) {
      struct itimerspec at = {.it_value = {(time_t)(next / NS_PER_S), (long)(next % NS_PER_S)}};
      timerfd_settime(timer, TFD_TIMER_ABSTIME, &at, NULL);
    }
  }
}
