/* What TVM's generated code asks of a runtime on a CPU, of torch's own OpenMP threads and the C library.
 *
 * TVM's runtime has threads of its own, and torch's go on looking for work for milliseconds after each operation, on the same
 * cores. Linked into every program that is kept (build.py), and written where its code looks for these functions. C and C++. */

#include <stdint.h>
#include <stdlib.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Of the OpenMP runtime that torch has loaded: libgomp's entry, which LLVM's and Intel's runtimes have too. */
extern void GOMP_parallel(void (*work)(void*), void* data, unsigned threads, unsigned flags);
extern int omp_get_thread_num(void);
extern int omp_get_num_threads(void);

typedef struct {
    void* barrier; /* no program has one */
    int32_t tasks;
} Group;

typedef int (*Task)(int index, Group* group, void* data);

typedef struct {
    Task task;
    void* data;
    int failed;
} Launch;

static void work(void* data) {
    Launch* launch = (Launch*)data;
    Group group = {0, omp_get_num_threads()};
    if (launch->task(omp_get_thread_num(), &group, launch->data)) launch->failed = 1; /* TVM's FFI has the message */
}

int ssdops_parallel_launch(Task task, void* data, int tasks) {
    Launch launch = {task, data, 0};
    (void)tasks; /* as many as there are threads */
    GOMP_parallel(work, &launch, 0, 0);
    return launch.failed ? -1 : 0;
}

void* ssdops_alloc_workspace(int device_type, int device_id, uint64_t bytes, int type_code, int type_bits) {
    void* memory = 0;
    (void)device_type, (void)device_id, (void)type_code, (void)type_bits;
    return posix_memalign(&memory, 64, bytes) ? 0 : memory;
}

int ssdops_free_workspace(int device_type, int device_id, void* memory) {
    (void)device_type, (void)device_id;
    free(memory);
    return 0;
}

#ifdef __cplusplus
}
#endif
