// One pool of threads for all kernels of the library.
#pragma once
#include <stdint.h>

namespace glm4 {

using Task = void (*)(void *context, int64_t index);

void set_threads(int threads);
int threads();

// Calls task(context, i) once for each i in [0, count), on the caller and the pool's threads; returns when all are
// done. Callers from several threads take turns. A task must not start a parallel region itself.
void run_parallel(int64_t count, Task task, void *context);

template <class Body>
void parallel_for(int64_t count, const Body &body) {
    run_parallel(
        count, [](void *context, int64_t i) { (*static_cast<const Body *>(context))(i); }, const_cast<Body *>(&body));
}

}  // namespace glm4
