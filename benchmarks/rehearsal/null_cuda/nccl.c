// NCCL without a device: logs each collective. build.py adds every other function that PyTorch
// needs.

#include <stdlib.h>
#include <string.h>
#include "null_cuda.h"

typedef struct { int size, rank; } Communicator;
typedef struct { char bytes[128]; } UniqueId;

static int create(Communicator **comm, int size, int rank) {
  *comm = malloc(sizeof **comm);
  **comm = (Communicator){size, rank};
  return 0;
}

int ncclGetVersion(int *version) { *version = 22809; return 0; }
int ncclGetUniqueId(UniqueId *id) { memset(id, 7, sizeof *id); return 0; }
int ncclCommInitRank(Communicator **comm, int size, UniqueId id, int rank) {
  return create(comm, size, rank);
}
int ncclCommInitRankConfig(Communicator **comm, int size, UniqueId id, int rank, void *config) {
  return create(comm, size, rank);
}
int ncclCommInitRankScalable(Communicator **comm, int size, int rank, int n_ids, UniqueId *ids,
                             void *config) {
  return create(comm, size, rank);
}
int ncclCommSplit(Communicator *comm, int color, int key, Communicator **out, void *config) {
  return create(out, comm->size, key);
}
int ncclCommCount(Communicator *comm, int *size) { *size = comm->size; return 0; }
int ncclCommUserRank(Communicator *comm, int *rank) { *rank = comm->rank; return 0; }
int ncclCommGetAsyncError(Communicator *comm, int *error) { *error = 0; return 0; }
const char *ncclGetErrorString(int error) { return "an error of the null device"; }
const char *ncclGetLastError(Communicator *comm) { return ""; }

// Types are numbers of ncclDataType_t. `count` is of the smaller side: what one rank contributes
// to a gather, or receives from a reduction.
static int log_collective(const char *name, size_t count, int type, void *stream) {
  null_log("collective", name, stream, "count=%zu type=%d", count, type);
  return 0;
}
int ncclAllGather(const void *from, void *to, size_t count, int type, void *comm, void *stream) {
  return log_collective("AllGather", count, type, stream);
}
int ncclReduceScatter(const void *from, void *to, size_t count, int type, int operation, void *comm,
                      void *stream) {
  return log_collective("ReduceScatter", count, type, stream);
}
int ncclAllReduce(const void *from, void *to, size_t count, int type, int operation, void *comm,
                  void *stream) {
  return log_collective("AllReduce", count, type, stream);
}
int ncclBroadcast(const void *from, void *to, size_t count, int type, int root, void *comm,
                  void *stream) {
  return log_collective("Broadcast", count, type, stream);
}
