/* LD_PRELOAD: system calls of one process that fail, stop, kill or change the world, by path and by count.

   faults_arm("write *.safetensors.partial 3 E5; open *.json 1+ E13") arms rules of the form `op pattern nth action`.
   op: read, write, sync, open, rename, reserve, copy, or change (all that alter a file system but open); pattern: fnmatch
   of the absolute path; nth: the call it strikes, `n+` from then on. Actions: En fails with errno n; K kills the process
   with half of a write done; S stops it (SIGSTOP); Zn sleeps n ms; H does half of what was asked; X/path lets this pass
   but fills the disk at path before; M/path renames path to path.away before; T/path cuts path to half before.
   `clock * 1+ J` makes the wall clock jump by ten years with every look at it. faults_count(i): calls that rule i saw. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { MOST = 16, HALF = -2 };
struct rule { char op[16], pattern[512], action[600]; long nth; int onward; atomic_long seen; };
static struct rule rules[MOST];
static int armed;

void faults_arm(const char *text) {
    char copy[8192], *save, *one;
    snprintf(copy, sizeof copy, "%s", text);
    armed = 0;
    int n = 0;
    for (one = strtok_r(copy, ";", &save); one && n < MOST; one = strtok_r(NULL, ";", &save)) {
        struct rule *r = &rules[n];
        char nth[32];
        memset(r, 0, sizeof *r);
        if (sscanf(one, " %15s %511s %31s %599s", r->op, r->pattern, nth, r->action) != 4) continue;
        r->nth = atol(nth);
        r->onward = nth[strlen(nth) - 1] == '+';
        n++;
    }
    armed = n;
}

long faults_count(int i) { return atomic_load(&rules[i].seen); }

static void fill(const char *path) {
    static char block[65536];
    int fd = syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CREAT | O_APPEND, 0600);
    for (size_t size = sizeof block; size; size /= 2)
        while (syscall(SYS_write, fd, block, size) == (long)size) {}
    syscall(SYS_close, fd);
}

/* 0: go on; HALF: do half; otherwise the errno to fail with. `kill_now` is set where the process must die after half. */
static int strike(const char *op, const char *path, int *kill_now) {
    int fate = 0, alters = strcmp(op, "read") && strcmp(op, "open") && strcmp(op, "clock");
    for (int i = 0; i < armed; i++) {
        struct rule *r = &rules[i];
        if (strcmp(r->op, op) && !(alters && !strcmp(r->op, "change"))) continue;
        if (fnmatch(r->pattern, path, 0)) continue;
        long n = atomic_fetch_add(&r->seen, 1) + 1;
        if (n != r->nth && !(r->onward && n > r->nth)) continue;
        const char *what = r->action + 1;
        char away[PATH_MAX];
        struct stat s;
        switch (r->action[0]) {
        case 'E': fate = atoi(what); break;
        case 'H': fate = HALF; break;
        case 'K': fate = HALF; *kill_now = 1; break;
        case 'S': kill(getpid(), SIGSTOP); break;
        case 'Z': usleep(1000 * atoi(what)); break;
        case 'X': fill(what); break;
        case 'T': if (!stat(what, &s)) truncate(what, s.st_size / 2); break;
        case 'M':
            snprintf(away, sizeof away, "%s.away", what);
            syscall(SYS_renameat, AT_FDCWD, what, AT_FDCWD, away);
        }
    }
    return fate;
}

static int strike_fd(const char *op, int fd, int *kill_now) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = syscall(SYS_readlinkat, AT_FDCWD, link, path, sizeof path - 1);
    if (n <= 0) return 0;
    path[n] = 0;
    return strike(op, path, kill_now);
}

static void die(void) { kill(getpid(), SIGKILL); pause(); }

#define NEXT(name) static typeof(&name) next; if (!next) next = (typeof(&name))dlsym(RTLD_NEXT, #name)
#define MEET(op, fd) int dead = 0, fate = armed ? strike_fd(op, fd, &dead) : 0; if (fate > 0) { errno = fate; return -1; }
#define HALVED(n) (fate == HALF && (n) > 1 ? (n) / 2 : (n))

ssize_t read(int fd, void *b, size_t n) { NEXT(read); MEET("read", fd); return next(fd, b, HALVED(n)); }
ssize_t pread64(int fd, void *b, size_t n, off64_t o) { NEXT(pread64); MEET("read", fd); return next(fd, b, HALVED(n), o); }
ssize_t preadv64v2(int fd, const struct iovec *v, int c, off64_t o, int f) {
    NEXT(preadv64v2);
    MEET("read", fd);
    struct iovec one = {v[0].iov_base, HALVED(v[0].iov_len)};
    return fate == HALF ? next(fd, &one, 1, o, f) : next(fd, v, c, o, f);
}
ssize_t write(int fd, const void *b, size_t n) {
    NEXT(write);
    MEET("write", fd);
    ssize_t done = next(fd, b, HALVED(n));
    if (dead) die();
    return done;
}
ssize_t pwrite64(int fd, const void *b, size_t n, off64_t o) {
    NEXT(pwrite64);
    MEET("write", fd);
    ssize_t done = next(fd, b, HALVED(n), o);
    if (dead) die();
    return done;
}
ssize_t copy_file_range(int a, off64_t *ao, int b, off64_t *bo, size_t n, unsigned f) {
    NEXT(copy_file_range);
    MEET("copy", b);
    ssize_t done = next(a, ao, b, bo, HALVED(n), f);
    if (dead) die();
    return done;
}
int fsync(int fd) { NEXT(fsync); MEET("sync", fd); if (dead) die(); return next(fd); }
int fdatasync(int fd) { NEXT(fdatasync); MEET("sync", fd); if (dead) die(); return next(fd); }
int posix_fallocate64(int fd, off64_t o, off64_t n) {
    NEXT(posix_fallocate64);
    int dead = 0, fate = armed ? strike_fd("reserve", fd, &dead) : 0;
    if (dead) die();
    return fate > 0 ? fate : next(fd, o, n); /* this one returns its errno */
}
int rename(const char *a, const char *b) {
    NEXT(rename);
    int dead = 0, fate = armed ? strike("rename", b, &dead) : 0;
    if (dead) die();
    if (fate > 0) { errno = fate; return -1; }
    return next(a, b);
}
int open64(const char *path, int flags, ...) {
    NEXT(open64);
    va_list rest;
    va_start(rest, flags);
    mode_t mode = va_arg(rest, mode_t);
    va_end(rest);
    int dead = 0, fate = armed ? strike("open", path, &dead) : 0;
    if (fate > 0) { errno = fate; return -1; }
    return next(path, flags, mode);
}
static long jump(void) {
    static atomic_long looks;
    int dead = 0;
    if (!armed) return 0;
    for (int i = 0; i < armed; i++)
        if (!strcmp(rules[i].op, "clock")) {
            strike("clock", "/", &dead);
            return atomic_fetch_add(&looks, 1) % 2 ? 315360000 : -315360000;
        }
    return 0;
}
int clock_gettime(clockid_t id, struct timespec *t) {
    NEXT(clock_gettime);
    int code = next(id, t);
    if (id == CLOCK_REALTIME) t->tv_sec += jump();
    return code;
}
time_t time(time_t *t) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (t) *t = now.tv_sec;
    return now.tv_sec;
}
