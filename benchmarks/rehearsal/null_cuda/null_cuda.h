// What the null libraries share: the device that they pretend to be, and the log.

#pragma once
#include <stddef.h>

// An H100 SXM of 80 GB.
#define DEVICE_NAME "NVIDIA H100 80GB HBM3"
#define DEVICE_MEMORY 85017755648ull
#define MULTIPROCESSORS 132
#define SHARED_MEMORY_PER_BLOCK 49152
#define SHARED_MEMORY_PER_BLOCK_OPTIN 232448
#define SHARED_MEMORY_PER_MULTIPROCESSOR 233472
#define REGISTERS 65536
#define CUDA_VERSION_NUMBER 13000

int null_device_count(void);

// Adds a line to the log, where one is open: kind, name, thread, stream, key=value pairs, by tabs.
// runtime.c defines it; the other libraries find it there.
__attribute__((format(printf, 4, 5)))
void null_log(const char *kind, const char *name, void *stream, const char *format, ...);
