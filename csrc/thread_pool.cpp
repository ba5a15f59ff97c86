#include "thread_pool.h"

#include "glm4_cpu.h"

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace glm4 {
namespace {

// Between the kernels of one step lie some tens of microseconds: waking a sleeping thread costs as much.
constexpr auto kSpinTime = std::chrono::microseconds(100);

void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

class ThreadPool {
  public:
    explicit ThreadPool(int threads) : threads_(threads) {}

    void resize(int threads) {
        std::lock_guard<std::mutex> turn(turn_);
        stop();
        threads_ = threads;
    }

    int size() const { return threads_; }

    void run(int64_t count, Task task, void *context) {
        if (count <= 0) return;
        if (count == 1 || threads_ == 1) {
            for (int64_t i = 0; i < count; ++i) task(context, i);
            return;
        }
        std::lock_guard<std::mutex> turn(turn_);
        start();
        task_ = task, context_ = context, count_ = count;
        next_.store(0);
        open_.store(true);
        round_.fetch_add(1);
        if (sleeping_.load() > 0) {
            {
                std::lock_guard<std::mutex> hold(sleep_);
            }
            wake_.notify_all();
        }
        work();
        // A thread that has not come by now is not waited for: it finds the region closed. One that is inside is
        // seen here, because it counts itself before it looks whether the region is open.
        open_.store(false);
        for (int spins = 0; inside_.load() > 0; ++spins) spins < 4096 ? relax() : static_cast<void>(sched_yield());
    }

    std::mutex &turn() { return turn_; }

  private:
    void start() {
        try {
            while (static_cast<int>(workers_.size()) < threads_ - 1)
                workers_.emplace_back([this, seen = round_.load()] { serve(seen); });
        } catch (const std::system_error &) {
            // The system gives no more threads: those that are there do the work.
        }
    }

    void stop() {
        stopping_.store(true);
        {
            std::lock_guard<std::mutex> hold(sleep_);
        }
        wake_.notify_all();
        for (std::thread &worker : workers_) worker.join();
        workers_.clear();
        stopping_.store(false);
    }

    void serve(uint32_t seen) {
        while (wait_for_round(seen)) {
            seen = round_.load();
            inside_.fetch_add(1);
            if (open_.load()) work();
            inside_.fetch_sub(1);
        }
    }

    void work() {
        for (int64_t i; (i = next_.fetch_add(1)) < count_;) task_(context_, i);
    }

    bool wait_for_round(uint32_t seen) {
        const auto deadline = std::chrono::steady_clock::now() + kSpinTime;
        do {
            for (int i = 0; i < 32; ++i) {
                if (stopping_.load()) return false;
                if (round_.load() != seen) return true;
                relax();
            }
        } while (std::chrono::steady_clock::now() < deadline);
        std::unique_lock<std::mutex> hold(sleep_);
        sleeping_.fetch_add(1);
        wake_.wait(hold, [&] { return round_.load() != seen || stopping_.load(); });
        sleeping_.fetch_sub(1);
        return !stopping_.load();
    }

    std::atomic<int> threads_;
    std::vector<std::thread> workers_;
    std::mutex turn_;  // held for a whole region
    std::mutex sleep_;
    std::condition_variable wake_;
    std::atomic<bool> stopping_{false};

    Task task_ = nullptr;  // these three are written while nobody is inside
    void *context_ = nullptr;
    int64_t count_ = 0;
    alignas(64) std::atomic<int64_t> next_{0};
    alignas(64) std::atomic<uint32_t> round_{0};
    std::atomic<bool> open_{false};
    std::atomic<int> sleeping_{0};
    alignas(64) std::atomic<int> inside_{0};
};

int hardware_threads() {
    const unsigned cores = std::thread::hardware_concurrency();
    return cores ? static_cast<int>(cores) : 1;
}

ThreadPool *pool;  // never destroyed: its threads may outlive static destructors

// A child of fork has none of the threads: it starts with a pool of its own. The parent's turn is held over the fork,
// so that no region is cut in two.
void before_fork() { pool->turn().lock(); }
void after_fork_in_parent() { pool->turn().unlock(); }
void after_fork_in_child() { pool = new ThreadPool(pool->size()); }

__attribute__((constructor)) void create_pool() {
    pool = new ThreadPool(hardware_threads());
    pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
}

}  // namespace

void set_threads(int threads) { pool->resize(threads < 1 ? 1 : threads); }
int threads() { return pool->size(); }
void run_parallel(int64_t count, Task task, void *context) { pool->run(count, task, context); }

}  // namespace glm4

extern "C" {
void glm4_set_threads(int threads) { glm4::set_threads(threads); }
int glm4_threads(void) { return glm4::threads(); }
}
