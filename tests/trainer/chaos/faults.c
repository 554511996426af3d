/* Counts the file events of a process under one folder, and makes one of them fail or kill the process.
 *
 * Loaded with LD_PRELOAD, so that events of Python, of Rust (safetensors) and of C++ are all seen. An event is a call of
 * one of the functions below on a path or an open file under `prefix`. A fault that kills writes half of the data first.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum kind { READ = 1, CREATE = 2, WRITE = 4, SYNC = 8, RENAME = 16, REMOVE = 32, MKDIR = 64, TRUNCATE = 128 };
enum mode { COUNT = 0, KILL = 1, FAIL = 2, FAIL_FROM = 3, SIGNAL = 4 }; /* FAIL_FROM: that event and all after it */

static char prefix[PATH_MAX];
static size_t prefix_length;
static int armed, mode, number, kinds, log_fd = -1;
static long at, events;

/* Forget all events; from now on the `at_`-th one (from 1) of `kinds_` fails with errno or raises a signal `number_`. */
void faults_arm(const char* folder, int mode_, long at_, int number_, int kinds_, int log_fd_) {
  snprintf(prefix, sizeof prefix, "%s", folder);
  prefix_length = strlen(prefix);
  mode = mode_, at = at_, number = number_, kinds = kinds_, log_fd = log_fd_;
  events = 0;
  armed = 1;
}

static int inside(const char* path) {
  return strncmp(path, prefix, prefix_length) == 0 && (path[prefix_length] == '/' || path[prefix_length] == 0);
}

static int of_fd(int fd, char* path) {
  char name[64];
  snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
  ssize_t length = readlink(name, path, PATH_MAX - 1);
  path[length < 0 ? 0 : length] = 0;
  return length > 0;
}

static int of_path(int folder, const char* name, char* path) {
  if (name == NULL) return 0;
  if (name[0] == '/' || folder == AT_FDCWD) return snprintf(path, PATH_MAX, "%s", name) > 0;
  if (!of_fd(folder, path)) return 0;
  strncat(path, "/", PATH_MAX - strlen(path) - 1);
  strncat(path, name, PATH_MAX - strlen(path) - 1);
  return 1;
}

/* 0: go on; 1: fail, errno is set; 2: the process must die now. */
static int event(enum kind kind, const char* path) {
  if (!armed || !(kind & kinds) || !inside(path)) return 0;
  events++;
  if (log_fd >= 0) dprintf(log_fd, "%d %s\n", kind, path + prefix_length);
  if (mode == SIGNAL && events == at) kill(getpid(), number);
  if (mode == KILL && events == at) return 2;
  if ((mode == FAIL && events == at) || (mode == FAIL_FROM && events >= at)) {
    errno = number;
    return 1;
  }
  return 0;
}

static void die(void) { kill(getpid(), SIGKILL); }

#define REAL(name) \
  static __typeof__(&name) real; \
  if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

#define BEFORE(kind, path) \
  do { \
    int fault = event(kind, path); \
    if (fault == 2) die(); \
    if (fault) return -1; \
  } while (0)

#define BEFORE_AT(kind, folder, name) \
  do { \
    char path[PATH_MAX]; \
    if (armed && of_path(folder, name, path)) BEFORE(kind, path); \
  } while (0)

#define BEFORE_FD(kind, fd) \
  do { \
    char path[PATH_MAX]; \
    if (armed && of_fd(fd, path)) BEFORE(kind, path); \
  } while (0)

static enum kind opened(int flags) { return flags & (O_CREAT | O_TRUNC) ? CREATE : flags & O_ACCMODE ? CREATE : READ; }

#define OPEN(function) \
  int function(const char* name, int flags, ...) { \
    REAL(function); \
    va_list more; \
    va_start(more, flags); \
    mode_t bits = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0; \
    va_end(more); \
    BEFORE_AT(opened(flags), AT_FDCWD, name); \
    return real(name, flags, bits); \
  }
OPEN(open)
OPEN(open64)

#define OPENAT(function) \
  int function(int folder, const char* name, int flags, ...) { \
    REAL(function); \
    va_list more; \
    va_start(more, flags); \
    mode_t bits = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0; \
    va_end(more); \
    BEFORE_AT(opened(flags), folder, name); \
    return real(folder, name, flags, bits); \
  }
OPENAT(openat)
OPENAT(openat64)

ssize_t write(int fd, const void* data, size_t size) {
  REAL(write);
  char path[PATH_MAX];
  int fault = armed && fd != log_fd && of_fd(fd, path) ? event(WRITE, path) : 0;
  if (fault == 2) {
    real(fd, data, size / 2);
    die();
  }
  return fault ? -1 : real(fd, data, size);
}

ssize_t writev(int fd, const struct iovec* parts, int count) {
  REAL(writev);
  BEFORE_FD(WRITE, fd);
  return real(fd, parts, count);
}

#define PWRITE(function, offset_type) \
  ssize_t function(int fd, const void* data, size_t size, offset_type offset) { \
    REAL(function); \
    BEFORE_FD(WRITE, fd); \
    return real(fd, data, size, offset); \
  }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

#define ON_FD(function, kind) \
  int function(int fd) { \
    REAL(function); \
    BEFORE_FD(kind, fd); \
    return real(fd); \
  }
ON_FD(fsync, SYNC)
ON_FD(fdatasync, SYNC)

int ftruncate(int fd, off_t size) {
  REAL(ftruncate);
  BEFORE_FD(TRUNCATE, fd);
  return real(fd, size);
}
int ftruncate64(int fd, off64_t size) {
  REAL(ftruncate64);
  BEFORE_FD(TRUNCATE, fd);
  return real(fd, size);
}

int rename(const char* from, const char* to) {
  REAL(rename);
  BEFORE_AT(RENAME, AT_FDCWD, from);
  return real(from, to);
}
int renameat(int a, const char* from, int b, const char* to) {
  REAL(renameat);
  BEFORE_AT(RENAME, a, from);
  return real(a, from, b, to);
}
int renameat2(int a, const char* from, int b, const char* to, unsigned flags) {
  REAL(renameat2);
  BEFORE_AT(RENAME, a, from);
  return real(a, from, b, to, flags);
}
int link(const char* from, const char* to) {
  REAL(link);
  BEFORE_AT(RENAME, AT_FDCWD, to);
  return real(from, to);
}
int linkat(int a, const char* from, int b, const char* to, int flags) {
  REAL(linkat);
  BEFORE_AT(RENAME, b, to);
  return real(a, from, b, to, flags);
}
int unlink(const char* name) {
  REAL(unlink);
  BEFORE_AT(REMOVE, AT_FDCWD, name);
  return real(name);
}
int unlinkat(int folder, const char* name, int flags) {
  REAL(unlinkat);
  BEFORE_AT(REMOVE, folder, name);
  return real(folder, name, flags);
}
int rmdir(const char* name) {
  REAL(rmdir);
  BEFORE_AT(REMOVE, AT_FDCWD, name);
  return real(name);
}
DIR* opendir(const char* name) {
  REAL(opendir);
  char path[PATH_MAX];
  int fault = armed && of_path(AT_FDCWD, name, path) ? event(READ, path) : 0;
  if (fault == 2) die();
  return fault ? NULL : real(name);
}
int mkdir(const char* name, mode_t bits) {
  REAL(mkdir);
  BEFORE_AT(MKDIR, AT_FDCWD, name);
  return real(name, bits);
}
int mkdirat(int folder, const char* name, mode_t bits) {
  REAL(mkdirat);
  BEFORE_AT(MKDIR, folder, name);
  return real(folder, name, bits);
}
