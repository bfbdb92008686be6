// Runs the threads of a block as fibers on one thread of the host.

#include <stdio.h>
#include <stdlib.h>
#include <ucontext.h>

#include <vector>

#include "cuda_runtime.h"

namespace on_host {

uint3 thread, block, block_size, grid_size;
double exchanged[1024];
int any;

namespace {

constexpr size_t kStack = 192 << 10;  // holds a kernel's argument of 32 KB, by value

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  bool done;
};

// Threads wait until as many as are expected have arrived.
struct Barrier {
  unsigned expected, arrived, generation;
};

Fiber fibers[1024];
ucontext_t scheduler;
Barrier of_block, of_warp[32];
const std::function<void()>* running;

void back_to_scheduler() {
  const unsigned self = thread.x;
  swapcontext(&fibers[self].context, &scheduler);
}

void wait(Barrier& barrier) {
  const unsigned generation = barrier.generation;
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
  }
  while (barrier.generation == generation) back_to_scheduler();
}

void run_fiber() {
  (*running)();
  fibers[thread.x].done = true;
  back_to_scheduler();
}

void fail(const char* message) {
  fprintf(stderr, "%s\n", message);
  abort();
}

}  // namespace

void block_barrier() { wait(of_block); }
void warp_barrier() { wait(of_warp[thread.x / 32]); }

void run_block(int threads, const std::function<void()>& kernel) {
  if (threads % 32) fail("a block is not made of whole warps");
  running = &kernel;
  block_size.x = threads;
  of_block.expected = threads;
  for (Barrier& barrier : of_warp) barrier.expected = 32;
  for (int t = 0; t < threads; ++t) {
    Fiber& fiber = fibers[t];
    fiber.stack.resize(kStack);
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    makecontext(&fiber.context, run_fiber, 0);
  }
  // In rising and falling order by turns: what a barrier is missing for, goes wrong in one of them.
  for (int left = threads, turn = 0; left > 0; ++turn) {
    if (turn > 1000) fail("the threads of a block wait for each other");
    for (int i = 0; i < threads; ++i) {
      thread.x = turn % 2 ? threads - 1 - i : i;
      if (fibers[thread.x].done) continue;
      const unsigned self = thread.x;
      swapcontext(&scheduler, &fibers[self].context);
      left -= fibers[self].done;
    }
  }
  if (of_block.arrived) fail("a thread ended while others wait for it");
}

}  // namespace on_host
