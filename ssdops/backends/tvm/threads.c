/* What TVM's generated code asks of a runtime on a CPU, of torch's own OpenMP threads and the C library; and a pass called again,
 * on GPUs too.
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

typedef struct { /* as TVM's FFI passes it */
    int32_t kind, padding;
    union {
        int64_t number;
        void* pointer;
    } value;
} Argument;

typedef struct { /* as DLPack has it */
    void* data;
    int32_t device[2], ndim, dtype;
    int64_t *shape, *strides;
    uint64_t offset;
} Tensor;

/* Logs of float32 as programs read them, called like a program: with what is given, what is filled, and how many there are. */

typedef struct {
    const float* from;
    double* to;
    int64_t count;
} Widening;

static int widen(int index, Group* group, void* data) {
    const Widening* all = (const Widening*)data;
    int64_t end = all->count * (index + 1) / group->tasks;
    for (int64_t i = all->count * index / group->tasks; i < end; i++) all->to[i] = all->from[i];
    return 0;
}

int ssdops_widen(void* self, const Argument* arguments, int32_t count, Argument* result) {
    const Tensor *from = (const Tensor*)arguments[0].value.pointer, *to = (const Tensor*)arguments[1].value.pointer;
    Widening all = {(const float*)from->data, (double*)to->data, arguments[2].value.number};
    Group alone = {0, 1};
    (void)self, (void)count, (void)result;
    return all.count < 32768 ? widen(0, &alone, &all) : ssdops_parallel_launch(widen, &all, 0); /* as torch has it */
}

/* A pass called again (replay.py): the arguments of its programs as they were, at other addresses. */

enum { ARGUMENTS = 64, NO_TENSOR = -1, OF_ROOM = -2, FIXED = -3 };

typedef struct {
    int (*run)(void* self, const Argument* arguments, int32_t count, Argument* result);
    const Argument* arguments;
    const Tensor* tensors;  /* those of arguments that are tensors, which begin so many bytes behind their source */
    const int32_t* sources; /* which of the addresses that is; or the room; or, for what never changes, 0 */
    int64_t count;
} Program;

typedef struct {
    const Program* programs;
    int64_t count, room; /* bytes of what programs hand on to one another, if that is not among the addresses */
    int (*set_stream)(int32_t device_type, int32_t device, void* stream, void** before); /* of TVM's FFI; 0 on a CPU */
    int32_t device, stream; /* which of the addresses that is */
} Pass;

enum { CUDA = 2 }; /* as DLPack has it */

int ssdops_replay(const Pass* pass, char* const* addresses) {
    void *room = 0, *before = 0;
    int failed = pass->room && posix_memalign(&room, 64, (size_t)pass->room);
    if (pass->set_stream) failed = pass->set_stream(CUDA, pass->device, addresses[pass->stream], &before);
    for (const Program* program = pass->programs; !failed && program < pass->programs + pass->count; program++) {
        Argument arguments[ARGUMENTS], result = {0, 0, {0}};
        Tensor tensors[ARGUMENTS]; /* copies: other threads may be here too */
        for (int64_t i = 0; i < program->count; i++) {
            int32_t source = program->sources[i];
            arguments[i] = program->arguments[i];
            if (source == NO_TENSOR) continue;
            tensors[i] = program->tensors[i];
            if (source != FIXED) tensors[i].data = (source == OF_ROOM ? (char*)room : addresses[source]) + (intptr_t)tensors[i].data;
            arguments[i].value.pointer = &tensors[i];
        }
        failed = program->run(0, arguments, (int32_t)program->count, &result);
    }
    if (pass->set_stream) pass->set_stream(CUDA, pass->device, before, 0);
    free(room);
    return failed;
}

#ifdef __cplusplus
}
#endif
