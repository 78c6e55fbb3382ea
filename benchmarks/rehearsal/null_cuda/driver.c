// libcuda.so.1 without a device: what Triton loads and launches kernels with. build.py adds every
// other function of cuda.h, as one that does nothing.

#define _GNU_SOURCE
#include <cuda.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <string.h>
#include "null_cuda.h"

// cuda.h renames it to the newest version. The library has both.
#undef cuGetProcAddress

CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { *version = CUDA_VERSION_NUMBER; return CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int *count) { *count = null_device_count(); return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int index) { *device = index; return CUDA_SUCCESS; }
CUresult cuDeviceGetName(char *name, int size, CUdevice device) {
  strncpy(name, DEVICE_NAME, size);
  return CUDA_SUCCESS;
}
CUresult cuDeviceTotalMem_v2(size_t *size, CUdevice device) {
  *size = DEVICE_MEMORY;
  return CUDA_SUCCESS;
}
CUresult cuMemGetInfo_v2(size_t *available, size_t *total) {
  *available = *total = DEVICE_MEMORY;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = MULTIPROCESSORS; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: *value = SHARED_MEMORY_PER_BLOCK; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
      *value = SHARED_MEMORY_PER_BLOCK_OPTIN;
      break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR:
      *value = SHARED_MEMORY_PER_MULTIPROCESSOR;
      break;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR: *value = 2048; break;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = 1024; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR:
      *value = REGISTERS;
      break;
    case CU_DEVICE_ATTRIBUTE_CLOCK_RATE: *value = 1980000; break;
    case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE: *value = 2619000; break;
    case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH: *value = 5120; break;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X: *value = 2147483647; break;
    default: *value = 0;
  }
  return CUDA_SUCCESS;
}

// Any address that is not NULL is a context.
static const CUcontext context = (CUcontext)0x77;

CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *is_active) {
  if (flags) *flags = 0;
  *is_active = 1;
  return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext *c, CUdevice device) {
  *c = context;
  return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext *c) { *c = context; return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) { *device = 0; return CUDA_SUCCESS; }

CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr address) {
  if (attribute == CU_POINTER_ATTRIBUTE_DEVICE_POINTER)
    *(CUdeviceptr *)value = address;
  else
    *(unsigned *)value = CU_MEMORYTYPE_DEVICE;
  return CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = "an error of the null device";
  return CUDA_SUCCESS;
}
CUresult cuGetErrorName(CUresult error, const char **name) {
  *name = "NULL_CUDA_ERROR";
  return CUDA_SUCCESS;
}

// ---- kernels ----

// A function's handle is the address of its name here.
#define MAX_FUNCTIONS 65536
static char *functions[MAX_FUNCTIONS];
static int n_functions;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  *module = (CUmodule)0x78;
  return CUDA_SUCCESS;
}
CUresult cuModuleLoadDataEx(CUmodule *module, const void *image, unsigned n_options,
                            CUjit_option *options, void **values) {
  return cuModuleLoadData(module, image);
}
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  pthread_mutex_lock(&lock);
  if (n_functions == MAX_FUNCTIONS) return CUDA_ERROR_OUT_OF_MEMORY;
  functions[n_functions] = strdup(name);
  *function = (CUfunction)&functions[n_functions++];
  pthread_mutex_unlock(&lock);
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024
           : attribute == CU_FUNC_ATTRIBUTE_NUM_REGS            ? 64
                                                                : 0;
  return CUDA_SUCCESS;
}
CUresult cuOccupancyMaxActiveClusters(int *count, CUfunction f, const CUlaunchConfig *config) {
  *count = 8;
  return CUDA_SUCCESS;
}

static CUresult launch(CUfunction function, long grid, long block, CUstream stream) {
  null_log("triton", *(char **)function, stream, "grid=%ld block=%ld", grid, block);
  return CUDA_SUCCESS;
}
CUresult cuLaunchKernel(CUfunction function, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                        unsigned by, unsigned bz, unsigned shared_memory, CUstream stream,
                        void **arguments, void **extra) {
  return launch(function, (long)gx * gy * gz, (long)bx * by * bz, stream);
}
CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction function, void **arguments,
                          void **extra) {
  return launch(function, (long)c->gridDimX * c->gridDimY * c->gridDimZ,
                (long)c->blockDimX * c->blockDimY * c->blockDimZ, c->hStream);
}

// ---- other entry points ----

static void *own_function(const char *name) {
  static void *self;
  Dl_info info;
  if (!self && dladdr((void *)own_function, &info))
    self = dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
  return dlsym(self, name);
}
CUresult cuGetProcAddress(const char *name, void **function, int version, cuuint64_t flags) {
  *function = own_function(name);
  return *function ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}
CUresult cuGetProcAddress_v2(const char *name, void **function, int version, cuuint64_t flags,
                             CUdriverProcAddressQueryResult *found) {
  *function = own_function(name);
  if (found) *found = *function ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
  return *function ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}
