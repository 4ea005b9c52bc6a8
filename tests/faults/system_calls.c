/* Loaded before the C library (LD_PRELOAD): counts a process's calls that have to do with files under one directory, and
   has one of them, or all from one on, go wrong. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { FAIL = 0, FAIL_FROM = 1, SHORT = 2, SIGNAL = 3 };
enum { MAX_CALLS = 1 << 16, NAME = 16 };

static char root[PATH_MAX];
static size_t root_length;
static long at = -1;
static int number, mode, armed;
static atomic_long calls;
static char names[MAX_CALLS][NAME];

void faults_arm(const char *directory, long at_call, int what, int how) {
    strncpy(root, directory, sizeof root - 1);
    root_length = strlen(root);
    at = at_call, number = what, mode = how;
    atomic_store(&calls, 0);
    armed = 1;
}
long faults_disarm(void) { armed = 0; return atomic_load(&calls); }
const char *faults_name(long call) { return call < MAX_CALLS ? names[call] : ""; }

static int is_inside(const char *path) {
    return strncmp(path, root, root_length) == 0 && (path[root_length] == '/' || path[root_length] == 0);
}

static int concerns(int directory, const char *path) {
    char place[PATH_MAX], link[64];
    ssize_t length;
    if (!armed) return 0;
    if (path && path[0] == '/') return is_inside(path);
    if (path && directory == AT_FDCWD) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", directory);
    length = readlink(link, place, sizeof place - 1);
    if (length <= 0) return 0;
    place[length] = 0;
    return is_inside(place);
}

/* 0: go on; -1: fail with errno; 1: do less than was asked for. */
static int judge(const char *name, int directory, const char *path, int may_be_short) {
    long call;
    int before = errno;
    if (!concerns(directory, path)) { errno = before; return 0; }
    if (mode == SHORT && !may_be_short) { errno = before; return 0; }
    call = atomic_fetch_add(&calls, 1);
    if (call < MAX_CALLS) strncpy(names[call], name, NAME - 1);
    errno = before;
    if (at < 0 || call < at || (call > at && mode != FAIL_FROM)) return 0;
    if (mode == SHORT) return 1;
    if (mode == SIGNAL) { kill(getpid(), number); return 0; }
    errno = number;
    return -1;
}

#define ON_PATH(type, function, failed, path, parameters, arguments) \
    type function parameters { \
        static type (*real) parameters; \
        if (!real) real = (type (*) parameters)dlsym(RTLD_NEXT, #function); \
        if (judge(#function, AT_FDCWD, path, 0)) return failed; \
        return real arguments; \
    }
#define ON_AT(type, function, failed, directory, path, parameters, arguments) \
    type function parameters { \
        static type (*real) parameters; \
        if (!real) real = (type (*) parameters)dlsym(RTLD_NEXT, #function); \
        if (judge(#function, directory, path, 0)) return failed; \
        return real arguments; \
    }
#define ON_FILE(type, function, failed, file, parameters, arguments) \
    type function parameters { \
        static type (*real) parameters; \
        if (!real) real = (type (*) parameters)dlsym(RTLD_NEXT, #function); \
        if (judge(#function, file, NULL, 0)) return failed; \
        return real arguments; \
    }
#define ON_BYTES(function, parameters, arguments) \
    ssize_t function parameters { \
        static ssize_t (*real) parameters; \
        if (!real) real = (ssize_t (*) parameters)dlsym(RTLD_NEXT, #function); \
        int verdict = judge(#function, file, NULL, 1); \
        if (verdict < 0) return -1; \
        if (verdict > 0 && count > 1) count = (count + 1) / 2; \
        return real arguments; \
    }
#define ON_VECTOR(function, parameters, arguments) \
    ssize_t function parameters { \
        static ssize_t (*real) parameters; \
        if (!real) real = (ssize_t (*) parameters)dlsym(RTLD_NEXT, #function); \
        int verdict = judge(#function, file, NULL, 1); \
        struct iovec first; \
        if (verdict < 0) return -1; \
        if (verdict > 0 && count > 0) { \
            first = parts[0]; \
            first.iov_len = (first.iov_len + 1) / 2; \
            parts = &first, count = 1; \
        } \
        return real arguments; \
    }
#define ON_OPEN(function) \
    int function(const char *path, int flags, ...) { \
        static int (*real)(const char *, int, ...); \
        va_list rest; \
        mode_t permissions; \
        if (!real) real = (int (*)(const char *, int, ...))dlsym(RTLD_NEXT, #function); \
        va_start(rest, flags); \
        permissions = (flags & (O_CREAT | __O_TMPFILE)) ? va_arg(rest, mode_t) : 0; \
        va_end(rest); \
        if (judge(#function, AT_FDCWD, path, 0)) return -1; \
        return real(path, flags, permissions); \
    }
#define ON_OPENAT(function) \
    int function(int directory, const char *path, int flags, ...) { \
        static int (*real)(int, const char *, int, ...); \
        va_list rest; \
        mode_t permissions; \
        if (!real) real = (int (*)(int, const char *, int, ...))dlsym(RTLD_NEXT, #function); \
        va_start(rest, flags); \
        permissions = (flags & (O_CREAT | __O_TMPFILE)) ? va_arg(rest, mode_t) : 0; \
        va_end(rest); \
        if (judge(#function, directory, path, 0)) return -1; \
        return real(directory, path, flags, permissions); \
    }

ON_OPEN(open)
ON_OPEN(open64)
ON_OPENAT(openat)
ON_OPENAT(openat64)
ON_BYTES(read, (int file, void *buffer, size_t count), (file, buffer, count))
ON_BYTES(pread, (int file, void *buffer, size_t count, off_t offset), (file, buffer, count, offset))
ON_BYTES(pread64, (int file, void *buffer, size_t count, off64_t offset), (file, buffer, count, offset))
ON_BYTES(write, (int file, const void *buffer, size_t count), (file, buffer, count))
ON_BYTES(pwrite, (int file, const void *buffer, size_t count, off_t offset), (file, buffer, count, offset))
ON_BYTES(pwrite64, (int file, const void *buffer, size_t count, off64_t offset), (file, buffer, count, offset))
ON_VECTOR(preadv, (int file, const struct iovec *parts, int count, off_t offset), (file, parts, count, offset))
ON_VECTOR(preadv64, (int file, const struct iovec *parts, int count, off64_t offset), (file, parts, count, offset))
ON_VECTOR(preadv2, (int file, const struct iovec *parts, int count, off_t offset, int flags),
          (file, parts, count, offset, flags))
ON_VECTOR(preadv64v2, (int file, const struct iovec *parts, int count, off64_t offset, int flags),
          (file, parts, count, offset, flags))
ON_VECTOR(readv, (int file, const struct iovec *parts, int count), (file, parts, count))
ON_VECTOR(writev, (int file, const struct iovec *parts, int count), (file, parts, count))
ON_FILE(int, fsync, -1, file, (int file), (file))
ON_FILE(int, fdatasync, -1, file, (int file), (file))
ON_FILE(int, flock, -1, file, (int file, int operation), (file, operation))
ON_FILE(int, ftruncate, -1, file, (int file, off_t length), (file, length))
ON_FILE(int, ftruncate64, -1, file, (int file, off64_t length), (file, length))
ON_FILE(int, posix_fallocate, errno, file, (int file, off_t start, off_t length), (file, start, length))
ON_FILE(int, posix_fallocate64, errno, file, (int file, off64_t start, off64_t length), (file, start, length))
ON_FILE(ssize_t, sendfile, -1, file, (int file, int from, off_t *offset, size_t count), (file, from, offset, count))
ON_FILE(ssize_t, sendfile64, -1, file, (int file, int from, off64_t *offset, size_t count), (file, from, offset, count))
ON_FILE(DIR *, fdopendir, NULL, file, (int file), (file))
ON_FILE(int, fstat, -1, file, (int file, struct stat *status), (file, status))
ON_FILE(int, fstat64, -1, file, (int file, struct stat64 *status), (file, status))
ON_PATH(int, truncate, -1, path, (const char *path, off_t length), (path, length))
ON_PATH(int, truncate64, -1, path, (const char *path, off64_t length), (path, length))
ON_PATH(int, rename, -1, to, (const char *from, const char *to), (from, to))
ON_AT(int, renameat, -1, there, to, (int here, const char *from, int there, const char *to), (here, from, there, to))
ON_AT(int, renameat2, -1, there, to, (int here, const char *from, int there, const char *to, unsigned flags),
      (here, from, there, to, flags))
ON_PATH(int, link, -1, to, (const char *from, const char *to), (from, to))
ON_PATH(int, symlink, -1, to, (const char *from, const char *to), (from, to))
ON_PATH(int, unlink, -1, path, (const char *path), (path))
ON_AT(int, unlinkat, -1, directory, path, (int directory, const char *path, int flags), (directory, path, flags))
ON_PATH(int, rmdir, -1, path, (const char *path), (path))
ON_PATH(int, mkdir, -1, path, (const char *path, mode_t mode), (path, mode))
ON_AT(int, mkdirat, -1, directory, path, (int directory, const char *path, mode_t mode), (directory, path, mode))
ON_PATH(DIR *, opendir, NULL, path, (const char *path), (path))
ON_PATH(int, stat, -1, path, (const char *path, struct stat *status), (path, status))
ON_PATH(int, stat64, -1, path, (const char *path, struct stat64 *status), (path, status))
ON_PATH(int, lstat, -1, path, (const char *path, struct stat *status), (path, status))
ON_PATH(int, lstat64, -1, path, (const char *path, struct stat64 *status), (path, status))
ON_AT(int, fstatat, -1, directory, path, (int directory, const char *path, struct stat *status, int flags),
      (directory, path, status, flags))
ON_AT(int, fstatat64, -1, directory, path, (int directory, const char *path, struct stat64 *status, int flags),
      (directory, path, status, flags))
