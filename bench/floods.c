// Senders of floods, and flows beside them, for bench/floods.sh.
//   floods send KIND INTERFACE MAC SOURCE TARGET PORT RATE SECONDS [FILE]   frames at RATE a second (0: as fast as it goes); prints how many a second
//   floods echo PORT                                              answers every datagram
//   floods probe TARGET PORT RATE SECONDS FILE                    50 flows, RATE datagrams a second; makes FILE once all were answered; prints
//                                                                 sent, lost, longest gap in ms, and the datagrams lost in the last second
// KIND: syn, fragment, icmp, echo, neighbor, udp (64 flows), handshake (the datagram in FILE). Sources are made up but for neighbor and udp.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <linux/if_packet.h>
#include <net/if.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>
#define BATCH 64
#define FLOWS 50
static double now(void) { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return t.tv_sec + t.tv_nsec / 1e9; }
static uint64_t state = 88172645463325252ull;
static uint32_t number(void) { state ^= state << 13; state ^= state >> 7; state ^= state << 17; return state >> 16; }
static uint32_t sum(const uint8_t *p, int n, uint32_t s) { for (int i = 0; i + 1 < n; i += 2) s += p[i] << 8 | p[i + 1]; if (n & 1) s += p[n - 1] << 8; return s; }
static void put16(uint8_t *p, uint16_t v) { p[0] = v >> 8; p[1] = v; }
static void put32(uint8_t *p, uint32_t v) { put16(p, v >> 16); put16(p + 2, v); }
static uint16_t folded(uint32_t s) { while (s >> 16) s = (s & 0xffff) + (s >> 16); return ~s; }

static uint8_t handshake[1500]; static int handshake_bytes;

// One IP packet; its length.
static int make(const char *kind, uint8_t *p, uint32_t source, uint32_t target, uint16_t port) {
  uint32_t from = 0x0a400000 | (number() & 0x3fffff), to = target;
  uint8_t *u = p + 20; int protocol = 17, upper = 8 + 18, offset = 0;
  memset(p, 0, 120);
  if (!strcmp(kind, "syn")) {
    protocol = 6; upper = 20;
    put16(u, 1024 + number() % 60000); put16(u + 2, port); put32(u + 4, number()); u[12] = 5 << 4; u[13] = 2; put16(u + 14, 65535);
  } else if (!strcmp(kind, "echo")) {
    protocol = 1; u[0] = 8; put32(u + 4, number());
  } else if (!strcmp(kind, "icmp")) {
    // "Port unreachable" about a flow that does not exist.
    protocol = 1; upper = 8 + 28; u[0] = 3; u[1] = 3;
    uint8_t *q = u + 8; q[0] = 0x45; put16(q + 2, 60); q[8] = 60; q[9] = 17; put32(q + 12, target); put32(q + 16, from);
    put16(q + 20, 1024 + number() % 60000); put16(q + 22, 53); put16(q + 24, 40); put16(q + 10, folded(sum(q, 20, 0)));
  } else if (!strcmp(kind, "neighbor")) {
    from = source; to = (target & 0xffff0000) | (number() & 0xffff);
    put16(u, 1024 + number() % 60000); put16(u + 2, 53); put16(u + 4, upper);
  } else if (!strcmp(kind, "udp")) {
    from = source;
    put16(u, 2000 + number() % 64); put16(u + 2, port); put16(u + 4, upper);
  } else if (!strcmp(kind, "handshake")) {
    upper = 8 + handshake_bytes;
    put16(u, 1024 + number() % 60000); put16(u + 2, port); put16(u + 4, upper); memcpy(u + 8, handshake, handshake_bytes);
  } else {
    // A first fragment, or one that waits for it.
    offset = number() & 1 ? 0x2000 : 0x2000 | 3; upper = 24;
    put16(u, 1024 + number() % 60000); put16(u + 2, port); put16(u + 4, 64);
  }
  p[0] = 0x45; put16(p + 2, 20 + upper); put16(p + 4, number()); put16(p + 6, offset); p[8] = 60; p[9] = protocol; put32(p + 12, from); put32(p + 16, to);
  put16(p + 10, folded(sum(p, 20, 0)));
  uint32_t pseudo = (from >> 16) + (from & 0xffff) + (to >> 16) + (to & 0xffff) + protocol + upper;
  if (protocol == 1) put16(u + 2, folded(sum(u, upper, 0)));
  if (protocol == 6) put16(u + 16, folded(sum(u, upper, pseudo)));
  return 20 + upper;
}

static int send_flood(char **a, int n) {
  static uint8_t frames[BATCH][1600]; static struct mmsghdr m[BATCH]; static struct iovec v[BATCH];
  const char *kind = a[0]; uint8_t mac[6]; uint32_t source = ntohl(inet_addr(a[3])), target = ntohl(inet_addr(a[4]));
  if (sscanf(a[2], "%hhx:%hhx:%hhx:%hhx:%hhx:%hhx", mac, mac + 1, mac + 2, mac + 3, mac + 4, mac + 5) != 6) return fprintf(stderr, "no MAC: %s\n", a[2]), 1;
  if (n > 8) { FILE *f = fopen(a[8], "r"); if (!f) return perror(a[8]), 1; handshake_bytes = fread(handshake, 1, sizeof handshake, f); fclose(f); }
  uint16_t port = atoi(a[5]); double rate = atof(a[6]), seconds = atof(a[7]);
  int fd = socket(AF_PACKET, SOCK_RAW, 0), one = 1;
  struct sockaddr_ll to = {.sll_family = AF_PACKET, .sll_ifindex = if_nametoindex(a[1]), .sll_protocol = htons(0x0800), .sll_halen = 6};
  if (fd < 0 || bind(fd, (void *)&to, sizeof to)) return perror("packet socket"), 1;
  setsockopt(fd, SOL_PACKET, PACKET_QDISC_BYPASS, &one, sizeof one);
  for (int i = 0; i < BATCH; i++) {
    memcpy(frames[i], mac, 6); memcpy(frames[i] + 6, "\x02\0\0\0\0\x66\x08", 8); put16(frames[i] + 12, 0x0800);
    v[i].iov_base = frames[i]; m[i].msg_hdr.msg_iov = &v[i]; m[i].msg_hdr.msg_iovlen = 1;
  }
  unsigned long count = 0; double begin = now(), t;
  while ((t = now() - begin) < seconds) {
    if (rate > 0 && count > rate * t) { struct timespec rest = {0, 200000}; nanosleep(&rest, 0); continue; }
    for (int i = 0; i < BATCH; i++) v[i].iov_len = 14 + make(kind, frames[i] + 14, source, target, port);
    int sent = sendmmsg(fd, m, BATCH, 0); if (sent > 0) count += sent;
  }
  printf("%.0f\n", count / (now() - begin));
  return 0;
}

static int echo(int port) {
  static uint8_t data[BATCH][2048]; static struct mmsghdr m[BATCH]; static struct iovec v[BATCH]; static struct sockaddr_in from[BATCH];
  int fd = socket(AF_INET, SOCK_DGRAM, 0), bytes = 8 << 20; struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(port)};
  setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &bytes, sizeof bytes);
  if (bind(fd, (void *)&at, sizeof at)) return perror("bind"), 1;
  for (;;) {
    for (int i = 0; i < BATCH; i++) {
      v[i] = (struct iovec){data[i], sizeof data[i]};
      m[i].msg_hdr = (struct msghdr){.msg_name = &from[i], .msg_namelen = sizeof from[i], .msg_iov = &v[i], .msg_iovlen = 1};
    }
    int n = recvmmsg(fd, m, BATCH, MSG_WAITFORONE, 0);
    for (int i = 0; i < n; i++) v[i].iov_len = m[i].msg_len;
    if (n > 0) sendmmsg(fd, m, n, 0);
  }
}

static int probe(char **a) {
  struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(atoi(a[1]))}; inet_pton(AF_INET, a[0], &to.sin_addr);
  double rate = atof(a[2]), seconds = atof(a[3]); struct pollfd p[FLOWS]; int bytes = 4 << 20;
  unsigned long sent = 0, came = 0, late_sent = 0, late_came = 0; uint8_t data[200] = {0};
  for (int i = 0; i < FLOWS; i++) {
    p[i] = (struct pollfd){socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK, 0), POLLIN, 0};
    setsockopt(p[i].fd, SOL_SOCKET, SO_RCVBUFFORCE, &bytes, sizeof bytes);
    if (connect(p[i].fd, (void *)&to, sizeof to)) return perror("connect"), 1;
  }
  double begin = now(), last = begin, gap = 0, t;
  while ((t = now() - begin) < seconds + 1) {
    while (t < seconds && sent < rate * t) {
      memcpy(data, &t, sizeof t);
      send(p[sent % FLOWS].fd, data, sizeof data, 0); sent++;
      if (t > seconds - 1) late_sent++;
    }
    struct timespec rest = {0, 500000};
    if (ppoll(p, FLOWS, &rest, 0) <= 0) continue;
    for (int i = 0; i < FLOWS; i++)
      while (p[i].revents && recv(p[i].fd, data, sizeof data, 0) > 0) {
        double at = now(), left; memcpy(&left, data, sizeof left);
        if (++came == 4 * FLOWS) { FILE *f = fopen(a[4], "w"); if (f) fclose(f); }
        if (left > seconds - 1) late_came++;
        if (at - last > gap) gap = at - last;
        last = at;
      }
  }
  printf("%lu %lu %.0f %lu\n", sent, sent - came, gap * 1e3, late_sent - late_came);
  return 0;
}

int main(int n, char **a) {
  if (n > 8 && !strcmp(a[1], "send")) return send_flood(a + 2, n - 2);
  if (n > 2 && !strcmp(a[1], "echo")) return echo(atoi(a[2]));
  if (n > 6 && !strcmp(a[1], "probe")) return probe(a + 2);
  fprintf(stderr, "floods: see the first lines of floods.c\n");
  return 2;
}
