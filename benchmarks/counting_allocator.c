// Preloaded: counts the bytes that a process holds from malloc and its like, and their peak (benchmarks/estimate.py).
#include <errno.h>
#include <malloc.h>
#include <stdatomic.h>
#include <stddef.h>

void* __libc_malloc(size_t);
void __libc_free(void*);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);

static _Atomic long now, peak;

static void* taken(void* memory) {
    if (memory == NULL) return NULL;
    long size = (long)malloc_usable_size(memory), held = atomic_fetch_add(&now, size) + size;
    long most = atomic_load(&peak);
    while (held > most && !atomic_compare_exchange_weak(&peak, &most, held)) {
    }
    return memory;
}

static void given_back(void* memory) {
    if (memory != NULL) atomic_fetch_sub(&now, (long)malloc_usable_size(memory));
}

void* malloc(size_t size) { return taken(__libc_malloc(size)); }
void* calloc(size_t count, size_t size) { return taken(__libc_calloc(count, size)); }
void* memalign(size_t alignment, size_t size) { return taken(__libc_memalign(alignment, size)); }
void* aligned_alloc(size_t alignment, size_t size) { return memalign(alignment, size); }

void free(void* memory) {
    given_back(memory);
    __libc_free(memory);
}

void* realloc(void* memory, size_t size) {
    given_back(memory);
    void* moved = __libc_realloc(memory, size);
    if (moved == NULL && size != 0) return taken(memory), NULL;
    return taken(moved);
}

int posix_memalign(void** memory, size_t alignment, size_t size) {
    void* found = memalign(alignment, size);
    if (found == NULL) return ENOMEM;
    *memory = found;
    return 0;
}

long counted_now(void) { return now; }
long counted_peak(void) { return peak; }
void counted_reset(void) { peak = now; }
