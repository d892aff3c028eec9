/* Preloaded into the Python processes of jobs: file system errors below one folder, and a wrong clock, as text files tell it.

   CHAOS_CONTROL    folder of the text files: node-NAME and job-ID ("ERRNO PERMILLE UNTIL"), clock-NAME ("SECONDS 0 UNTIL")
   CHAOS_ROOT       folder below which calls fail
   UNTIL is a time of the boot-time clock in seconds. PERMILLE: how many of a thousand calls fail.
   ENOSPC fails only calls that need space. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static char control[PATH_MAX], root[PATH_MAX], node[256], job[64];
static int enabled;
static unsigned int state;

__attribute__((constructor)) static void prepare(void) {
    const char *folder = getenv("CHAOS_CONTROL"), *below = getenv("CHAOS_ROOT");
    const char *name = getenv("SLURMD_NODENAME"), *id = getenv("SLURM_JOB_ID");
    if (!folder || !below || strncmp(program_invocation_short_name, "python", 6) != 0) return;
    snprintf(control, sizeof control, "%s", folder);
    snprintf(root, sizeof root, "%s", below);
    snprintf(node, sizeof node, "%s", name ? name : "");
    snprintf(job, sizeof job, "%s", id ? id : "");
    state = (unsigned int)getpid() * 2654435761u + 1;
    enabled = 1;
}

/* The two numbers of a text file that is still valid; 0 if there is none. System calls of its own: the functions below call this. */
static int told(const char *kind, const char *name, double *first, double *second) {
    char path[PATH_MAX + 300], text[128];
    struct timespec now;
    double until;
    int saved = errno;
    if (!enabled || !name[0]) return 0;
    snprintf(path, sizeof path, "%s/%s-%s", control, kind, name);
    long file = syscall(SYS_openat, AT_FDCWD, path, O_RDONLY | O_CLOEXEC, 0);
    errno = saved;
    if (file < 0) return 0;
    long length = syscall(SYS_read, file, text, sizeof text - 1);
    syscall(SYS_close, file);
    errno = saved;
    if (length <= 0) return 0;
    text[length] = 0;
    if (sscanf(text, "%lf %lf %lf", first, second, &until) != 3) return 0;
    syscall(SYS_clock_gettime, CLOCK_BOOTTIME, &now);
    return now.tv_sec + now.tv_nsec / 1e9 < until;
}

static int drawn(double permille) {
    state = state * 1103515245u + 12345u;
    return (state >> 8) % 1000 < permille;
}

/* Whether a call on a path fails now, with errno set. */
static int fails(const char *path, int needs_space) {
    double error, permille;
    if (!enabled || !path || strncmp(path, root, strlen(root)) != 0) return 0;
    if (!told("job", job, &error, &permille) && !told("node", node, &error, &permille)) return 0;
    if ((int)error == ENOSPC && !needs_space) return 0;
    if (!drawn(permille)) return 0;
    errno = (int)error;
    return 1;
}

static int descriptor_fails(int descriptor) {
    char link[64], path[PATH_MAX];
    int saved = errno;
    if (!enabled) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    long length = syscall(SYS_readlink, link, path, sizeof path - 1);
    errno = saved;
    if (length <= 0) return 0;
    path[length] = 0;
    return fails(path, 1);
}

#define NEXT(name) __typeof__(&name) next = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define MODE(last) va_list list; va_start(list, last); mode_t mode = va_arg(list, mode_t); va_end(list)

int open64(const char *path, int flags, ...) { MODE(flags); NEXT(open64); return fails(path, flags & O_CREAT) ? -1 : next(path, flags, mode); }
int open(const char *path, int flags, ...) { MODE(flags); NEXT(open); return fails(path, flags & O_CREAT) ? -1 : next(path, flags, mode); }
int openat64(int at, const char *path, int flags, ...) { MODE(flags); NEXT(openat64); return fails(path, flags & O_CREAT) ? -1 : next(at, path, flags, mode); }
int stat64(const char *path, struct stat64 *out) { NEXT(stat64); return fails(path, 0) ? -1 : next(path, out); }
int lstat64(const char *path, struct stat64 *out) { NEXT(lstat64); return fails(path, 0) ? -1 : next(path, out); }
int fstatat64(int at, const char *path, struct stat64 *out, int flags) { NEXT(fstatat64); return fails(path, 0) ? -1 : next(at, path, out, flags); }
int mkdir(const char *path, mode_t mode) { NEXT(mkdir); return fails(path, 1) ? -1 : next(path, mode); }
int link(const char *from, const char *to) { NEXT(link); return fails(to, 1) ? -1 : next(from, to); }
int linkat(int at, const char *from, int other, const char *to, int flags) { NEXT(linkat); return fails(to, 1) ? -1 : next(at, from, other, to, flags); }
int rename(const char *from, const char *to) { NEXT(rename); return fails(to, 0) ? -1 : next(from, to); }
int fsync(int descriptor) { NEXT(fsync); return descriptor_fails(descriptor) ? -1 : next(descriptor); }
ssize_t write(int descriptor, const void *data, size_t size) { NEXT(write); return descriptor_fails(descriptor) ? -1 : next(descriptor, data, size); }
DIR *opendir(const char *path) { NEXT(opendir); return fails(path, 0) ? NULL : next(path); }

int clock_gettime(clockid_t clock, struct timespec *out) {
    double seconds, unused;
    int code = (int)syscall(SYS_clock_gettime, clock, out);
    if (code == 0 && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE) && told("clock", node, &seconds, &unused))
        out->tv_sec += (time_t)seconds;
    return code;
}

int gettimeofday(struct timeval *restrict out, void *restrict zone) {
    struct timespec now;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &now);
    out->tv_sec = now.tv_sec;
    out->tv_usec = now.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *out) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out) *out = now.tv_sec;
    return now.tv_sec;
}
