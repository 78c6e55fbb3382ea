// cuBLAS without a device: logs each matmul. build.py adds every other function that PyTorch needs.

#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include "null_cuda.h"

static _Thread_local void *current_stream;

int cublasCreate_v2(void **handle) { *handle = (void *)0x55; return 0; }
int cublasGetMathMode(void *handle, int *mode) { *mode = 0; return 0; }
int cublasGetPointerMode_v2(void *handle, int *mode) { *mode = 0; return 0; }
int cublasSetStream_v2(void *handle, void *stream) { current_stream = stream; return 0; }

// Types are numbers of cudaDataType. The matrices are column-major: of a row-major product
// (M, K) x (K, N) cuBLAS sees the transpose, so m is N and n is M.
static void log_matmul(const char *name, int transpose_a, int transpose_b, long m, long n, long k,
                       long batch, int type_a, int type_b, int type_c, float beta) {
  null_log("matmul", name, current_stream,
           "ta=%d tb=%d m=%ld n=%ld k=%ld batch=%ld a=%d b=%d c=%d beta=%g", transpose_a,
           transpose_b, m, n, k, batch, type_a, type_b, type_c, beta);
}

int cublasGemmEx(void *handle, int ta, int tb, int m, int n, int k, const void *alpha,
                 const void *a, int type_a, int lda, const void *b, int type_b, int ldb,
                 const void *beta, void *c, int type_c, int ldc, int compute_type, int algorithm) {
  log_matmul("GemmEx", ta, tb, m, n, k, 1, type_a, type_b, type_c, *(const float *)beta);
  return 0;
}
int cublasGemmStridedBatchedEx(void *handle, int ta, int tb, int m, int n, int k, const void *alpha,
                               const void *a, int type_a, int lda, long long stride_a,
                               const void *b, int type_b, int ldb, long long stride_b,
                               const void *beta, void *c, int type_c, int ldc, long long stride_c,
                               int batch, int compute_type, int algorithm) {
  log_matmul("GemmStridedBatchedEx", ta, tb, m, n, k, batch, type_a, type_b, type_c,
             *(const float *)beta);
  return 0;
}
int cublasSgemm_v2(void *handle, int ta, int tb, int m, int n, int k, const float *alpha,
                   const float *a, int lda, const float *b, int ldb, const float *beta, float *c,
                   int ldc) {
  log_matmul("Sgemm", ta, tb, m, n, k, 1, 0, 0, 0, *beta);
  return 0;
}

// ---- cuBLASLt ----

// A layout remembers its shape, so that the matmul can be logged.
typedef struct { int type; uint64_t rows, columns; int64_t stride; int used; } Layout;
typedef struct { int transpose_a, transpose_b, used; } Description;
#define MAX_HANDLES 4096
static _Thread_local Layout layouts[MAX_HANDLES];
static _Thread_local Description descriptions[MAX_HANDLES];

size_t cublasLtGetVersion(void) { return 130000; }
int cublasLtMatrixLayoutCreate(void **layout, int type, uint64_t rows, uint64_t columns,
                               int64_t stride) {
  for (int i = 0; i < MAX_HANDLES; i++)
    if (!layouts[i].used) {
      layouts[i] = (Layout){type, rows, columns, stride, 1};
      *layout = &layouts[i];
      return 0;
    }
  return 3;
}
int cublasLtMatrixLayoutDestroy(Layout *layout) { layout->used = 0; return 0; }
int cublasLtMatmulDescCreate(void **description, int compute_type, int scale_type) {
  for (int i = 0; i < MAX_HANDLES; i++)
    if (!descriptions[i].used) {
      descriptions[i] = (Description){0, 0, 1};
      *description = &descriptions[i];
      return 0;
    }
  return 3;
}
int cublasLtMatmulDescDestroy(Description *description) { description->used = 0; return 0; }
int cublasLtMatmulDescSetAttribute(Description *d, int attribute, const void *value, size_t size) {
  // CUBLASLT_MATMUL_DESC_TRANSA and _TRANSB.
  if (attribute == 3) d->transpose_a = *(const int *)value;
  if (attribute == 4) d->transpose_b = *(const int *)value;
  return 0;
}
int cublasLtMatmulPreferenceCreate(void **preference) { *preference = (void *)0x58; return 0; }
int cublasLtMatmulAlgoGetHeuristic(void *handle, void *description, void *a, void *b, void *c,
                                   void *d, void *preference, int requested, void *results,
                                   int *found) {
  // One result: an algorithm of zeros, which needs no workspace.
  memset(results, 0, 96);
  *found = 1;
  return 0;
}
int cublasLtMatmul(void *handle, Description *d, const void *alpha, const void *a, Layout *la,
                   const void *b, Layout *lb, const void *beta, const void *c, Layout *lc,
                   void *out, Layout *ld, const void *algorithm, void *workspace, size_t size,
                   void *stream) {
  long k = d->transpose_a ? la->rows : la->columns;
  current_stream = stream;
  log_matmul("LtMatmul", d->transpose_a, d->transpose_b, ld->rows, ld->columns, k, 1, la->type,
             lb->type, ld->type, *(const float *)beta);
  return 0;
}
