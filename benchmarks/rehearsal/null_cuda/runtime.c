// A CUDA runtime without a device, to be preloaded before PyTorch's own. Device memory is reserved
// address space, which reads as zeros. Kernels do nothing, and events have happened as soon as they are
// recorded.

#define _GNU_SOURCE
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#include "null_cuda.h"

// ---- the log ----

static pthread_mutex_t log_lock = PTHREAD_MUTEX_INITIALIZER;
static FILE *log_file;

// Starts a log at `path`, or ends the present one where `path` is NULL.
void null_log_to(const char *path) {
  pthread_mutex_lock(&log_lock);
  if (log_file) fclose(log_file);
  log_file = path ? fopen(path, "w") : NULL;
  pthread_mutex_unlock(&log_lock);
}

void null_log(const char *kind, const char *name, void *stream, const char *format, ...) {
  pthread_mutex_lock(&log_lock);
  if (log_file) {
    fprintf(log_file, "%s\t%s\t%ld\t%p\t", kind, name, (long)syscall(SYS_gettid), stream);
    va_list values;
    va_start(values, format);
    vfprintf(log_file, format, values);
    va_end(values);
    fputc('\n', log_file);
  }
  pthread_mutex_unlock(&log_lock);
}

// ---- the device ----

int null_device_count(void) {
  const char *count = getenv("NULL_CUDA_DEVICES");
  return count ? atoi(count) : 1;
}

static _Thread_local int current_device;

cudaError_t cudaGetDeviceCount(int *count) { *count = null_device_count(); return cudaSuccess; }
cudaError_t cudaGetDevice(int *device) { *device = current_device; return cudaSuccess; }
cudaError_t cudaSetDevice(int device) { current_device = device; return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int *v) { *v = CUDA_VERSION_NUMBER; return cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *v) { *v = CUDA_VERSION_NUMBER; return cudaSuccess; }
cudaError_t cudaGetLastError(void) { return cudaSuccess; }
cudaError_t cudaPeekAtLastError(void) { return cudaSuccess; }

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, DEVICE_NAME);
  p->totalGlobalMem = DEVICE_MEMORY;
  p->major = 9;
  p->multiProcessorCount = MULTIPROCESSORS;
  p->warpSize = 32;
  p->maxThreadsPerBlock = 1024;
  p->maxThreadsPerMultiProcessor = 2048;
  p->maxBlocksPerMultiProcessor = 32;
  p->regsPerBlock = p->regsPerMultiprocessor = REGISTERS;
  p->sharedMemPerBlock = SHARED_MEMORY_PER_BLOCK;
  p->sharedMemPerBlockOptin = SHARED_MEMORY_PER_BLOCK_OPTIN;
  p->sharedMemPerMultiprocessor = SHARED_MEMORY_PER_MULTIPROCESSOR;
  p->reservedSharedMemPerBlock = 1024;
  p->l2CacheSize = 50 << 20;
  p->memoryBusWidth = 5120;
  p->unifiedAddressing = 1;
  p->maxGridSize[0] = 2147483647;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrMultiProcessorCount: *value = MULTIPROCESSORS; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = SHARED_MEMORY_PER_BLOCK; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = SHARED_MEMORY_PER_BLOCK_OPTIN; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = SHARED_MEMORY_PER_MULTIPROCESSOR;
      break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrMaxGridDimX: *value = 2147483647; break;
    case cudaDevAttrMaxRegistersPerBlock: *value = REGISTERS; break;
    default: *value = 0;
  }
  return cudaSuccess;
}

cudaError_t cudaDeviceGetPCIBusId(char *id, int size, int device) {
  snprintf(id, size, "0000:%02x:00.0", device);
  return cudaSuccess;
}

cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) {
  *can = 0;
  return cudaSuccess;
}

// ---- memory ----

#define ADDRESS_SPACE (1ull << 42)
#define MAX_ALLOCATIONS (1 << 16)

static pthread_mutex_t memory_lock = PTHREAD_MUTEX_INITIALIZER;
static char *space;
static size_t space_used, memory_used;
static struct { char *start; size_t size; } allocations[MAX_ALLOCATIONS];
static int n_allocations;

// Bytes that processes may allocate. What a CUDA context and NCCL take can be set aside.
static size_t memory_limit(void) {
  const char *taken = getenv("NULL_CUDA_TAKEN_MIB");
  return DEVICE_MEMORY - (taken ? strtoull(taken, NULL, 10) << 20 : 0);
}

static int is_on_device(const void *address) {
  return space && (const char *)address >= space && (const char *)address < space + ADDRESS_SPACE;
}

// Addresses are never used again, so that a stale one is not mistaken for a new tensor.
static char *take_addresses(size_t size, size_t alignment) {
  if (!space)
    space = mmap(NULL, ADDRESS_SPACE, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  size_t start = (space_used + alignment - 1) & ~(alignment - 1);
  space_used = start + size;
  if (space_used > ADDRESS_SPACE) abort();
  return space + start;
}

cudaError_t cudaMalloc(void **address, size_t size) {
  size = (size + 511) & ~(size_t)511;
  null_log("malloc", "cudaMalloc", NULL, "bytes=%zu", size);
  pthread_mutex_lock(&memory_lock);
  cudaError_t result = cudaErrorMemoryAllocation;
  if (memory_used + size <= memory_limit() && n_allocations < MAX_ALLOCATIONS) {
    *address = take_addresses(size, 512);
    allocations[n_allocations].start = *address;
    allocations[n_allocations++].size = size;
    memory_used += size;
    result = cudaSuccess;
  }
  pthread_mutex_unlock(&memory_lock);
  return result;
}

cudaError_t cudaFree(void *address) {
  pthread_mutex_lock(&memory_lock);
  for (int i = n_allocations - 1; i >= 0; i--) {
    if (allocations[i].start == address) {
      memory_used -= allocations[i].size;
      allocations[i] = allocations[--n_allocations];
      break;
    }
  }
  pthread_mutex_unlock(&memory_lock);
  return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t *available, size_t *total) {
  *total = DEVICE_MEMORY;
  *available = memory_limit() - memory_used;
  return cudaSuccess;
}

cudaError_t cudaHostAlloc(void **address, size_t size, unsigned flags) {
  *address = aligned_alloc(4096, (size + 4095) & ~(size_t)4095);
  return *address ? cudaSuccess : cudaErrorMemoryAllocation;
}
cudaError_t cudaFreeHost(void *address) { free(address); return cudaSuccess; }
cudaError_t cudaHostRegister(void *address, size_t size, unsigned flags) { return cudaSuccess; }
cudaError_t cudaHostUnregister(void *address) { return cudaSuccess; }
cudaError_t cudaGetSymbolAddress(void **address, const void *symbol) {
  return cudaMalloc(address, 1024);
}
cudaError_t cudaMemcpyToSymbol(const void *symbol, const void *source, size_t size, size_t offset,
                               enum cudaMemcpyKind kind) {
  return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *address) {
  memset(a, 0, sizeof *a);
  a->type = is_on_device(address) ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
  a->devicePointer = (void *)address;
  a->device = current_device;
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind,
                            cudaStream_t stream) {
  int to_device = is_on_device(to), from_device = is_on_device(from);
  const char *name = to_device ? (from_device ? "D2D" : "H2D") : (from_device ? "D2H" : "H2H");
  null_log("memcpy", name, stream, "bytes=%zu", size);
  // The device holds zeros: its memory never becomes real.
  if (!to_device && from_device) memset(to, 0, size);
  if (!to_device && !from_device) memcpy(to, from, size);
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
  null_log("sync", "cudaMemcpy", NULL, "");
  return cudaMemcpyAsync(to, from, size, kind, NULL);
}

cudaError_t cudaMemsetAsync(void *address, int value, size_t size, cudaStream_t stream) {
  null_log("memset", "memset", stream, "bytes=%zu", size);
  return cudaSuccess;
}
cudaError_t cudaMemset(void *address, int value, size_t size) {
  return cudaMemsetAsync(address, value, size, NULL);
}

// ---- streams and events ----

static _Atomic intptr_t last_handle = 0x1000;

static void *new_handle(void) { return (void *)(last_handle += 16); }

cudaError_t cudaStreamCreate(cudaStream_t *s) { *s = new_handle(); return cudaSuccess; }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned flags) {
  return cudaStreamCreate(s);
}
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned flags, int priority) {
  return cudaStreamCreate(s);
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) { return cudaSuccess; }
cudaError_t cudaStreamQuery(cudaStream_t stream) { return cudaSuccess; }
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) {
  *priority = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
  null_log("wait", "event", stream, "event=%p", (void *)event);
  return cudaSuccess;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void *data) {
  function(data);
  return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t *event) { *event = new_handle(); return cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
  return cudaEventCreate(event);
}
cudaError_t cudaEventDestroy(cudaEvent_t event) { return cudaSuccess; }
cudaError_t cudaEventQuery(cudaEvent_t event) { return cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  null_log("record", "event", stream, "event=%p", (void *)event);
  return cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
  return cudaEventRecord(event, stream);
}
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t end) {
  *milliseconds = 1;
  return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize(void) {
  null_log("sync", "cudaDeviceSynchronize", NULL, "");
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  null_log("sync", "cudaStreamSynchronize", stream, "");
  return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  null_log("sync", "cudaEventSynchronize", NULL, "event=%p", (void *)event);
  return cudaSuccess;
}

// No graph is ever captured.
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status,
                                     unsigned long long *id, cudaGraph_t *graph,
                                     const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges,
                                     size_t *count) {
  *status = cudaStreamCaptureStatusNone;
  if (id) *id = 0;
  return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) {
  return cudaSuccess;
}

// ---- kernels ----

// nvcc registers the name of each kernel under the address of its stub on the host.
#define MAX_KERNELS (1 << 20)
static struct { const void *stub; const char *name; } kernels[MAX_KERNELS];

static unsigned kernel_slot(const void *stub) {
  unsigned slot = ((uintptr_t)stub >> 4) * 2654435761u % MAX_KERNELS;
  while (kernels[slot].stub && kernels[slot].stub != stub) slot = (slot + 1) % MAX_KERNELS;
  return slot;
}

void __cudaRegisterFunction(void **fat_binary, const char *stub, char *device_function,
                            const char *name, int thread_limit, void *thread_id, void *block_id,
                            void *block_size, void *grid_size, int *warp_size) {
  unsigned slot = kernel_slot(stub);
  kernels[slot].stub = stub;
  kernels[slot].name = name;
}

static cudaError_t launch(const void *stub, dim3 grid, dim3 block, cudaStream_t stream) {
  const char *name = kernels[kernel_slot(stub)].name;
  null_log("kernel", name ? name : "?", stream, "grid=%ld block=%ld",
           (long)grid.x * grid.y * grid.z, (long)block.x * block.y * block.z);
  return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void *stub, dim3 grid, dim3 block, void **arguments,
                             size_t shared_memory, cudaStream_t stream) {
  return launch(stub, grid, block, stream);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *stub,
                                void **arguments) {
  return launch(stub, config->gridDim, config->blockDim, config->stream);
}
cudaError_t __cudaLaunchKernel(void *stub, dim3 grid, dim3 block, void **arguments,
                               size_t shared_memory, cudaStream_t stream) {
  return launch(stub, grid, block, stream);
}
cudaError_t __cudaGetKernel(void **kernel, const void *stub) {
  *kernel = (void *)stub;
  return cudaSuccess;
}
cudaError_t cudaKernelSetAttributeForDevice(cudaKernel_t kernel, enum cudaFuncAttribute attribute,
                                            int value, int device) {
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void *stub, enum cudaFuncAttribute attribute, int value) {
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *stub) {
  memset(a, 0, sizeof *a);
  a->numRegs = 64;
  a->maxThreadsPerBlock = 1024;
  a->binaryVersion = a->ptxVersion = 90;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *stub,
                                                                   int block_size, size_t shared,
                                                                   unsigned flags) {
  *blocks = 2;
  return cudaSuccess;
}

// ---- driver functions that PyTorch asks the runtime for ----

static CUresult context_state(CUdevice device, unsigned *flags, int *is_active) {
  if (flags) *flags = 0;
  *is_active = 1;
  return CUDA_SUCCESS;
}
static CUresult get_device(CUdevice *device, int index) { *device = index; return CUDA_SUCCESS; }
static CUresult device_attribute(int *value, int attribute, CUdevice device) {
  *value = attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR ? 9 : 0;
  return CUDA_SUCCESS;
}
static CUresult error_string(CUresult error, const char **text) {
  *text = "an error of the null device";
  return CUDA_SUCCESS;
}

// Expandable segments reserve addresses, and map memory into them.
static const size_t granularity = 2 << 20;

static CUresult reserve_addresses(CUdeviceptr *address, size_t size, size_t alignment,
                                  CUdeviceptr wanted, unsigned long long flags) {
  pthread_mutex_lock(&memory_lock);
  *address = (CUdeviceptr)take_addresses(size, granularity);
  pthread_mutex_unlock(&memory_lock);
  return CUDA_SUCCESS;
}
static CUresult create_memory(CUmemGenericAllocationHandle *handle, size_t size,
                              const CUmemAllocationProp *properties, unsigned long long flags) {
  null_log("malloc", "cuMemCreate", NULL, "bytes=%zu", size);
  pthread_mutex_lock(&memory_lock);
  int fits = memory_used + size <= memory_limit();
  if (fits) memory_used += size;
  pthread_mutex_unlock(&memory_lock);
  *handle = size;
  return fits ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}
static CUresult release_memory(CUmemGenericAllocationHandle handle) {
  pthread_mutex_lock(&memory_lock);
  memory_used -= handle;
  pthread_mutex_unlock(&memory_lock);
  return CUDA_SUCCESS;
}
static CUresult memory_granularity(size_t *size, const CUmemAllocationProp *properties,
                                   CUmemAllocationGranularity_flags option) {
  *size = granularity;
  return CUDA_SUCCESS;
}
static CUresult succeed(void) { return CUDA_SUCCESS; }

static const struct { const char *name; void *function; } driver_functions[] = {
    {"cuDevicePrimaryCtxGetState", context_state},
    {"cuDeviceGet", get_device},
    {"cuDeviceGetAttribute", device_attribute},
    {"cuGetErrorString", error_string},
    {"cuMemAddressReserve", reserve_addresses},
    {"cuMemCreate", create_memory},
    {"cuMemRelease", release_memory},
    {"cuMemGetAllocationGranularity", memory_granularity},
};

cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version,
                                             unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *found) {
  *function = succeed;
  for (size_t i = 0; i < sizeof driver_functions / sizeof *driver_functions; i++)
    if (!strcmp(name, driver_functions[i].name)) *function = driver_functions[i].function;
  if (found) *found = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
