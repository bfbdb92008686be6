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

// Threads wait until as many as are expected have arrived.
struct Barrier {
  unsigned expected, arrived, generation;
};

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  bool done;
  const Barrier* barrier;  // that it waits at, while its generation lasts
  unsigned generation;

  bool ready() const { return !done && !(barrier && barrier->generation == generation); }
};

Fiber fibers[1024];
ucontext_t scheduler;
Barrier of_block, of_warp[32];
const std::function<void()>* running;

void back_to_scheduler() { swapcontext(&fibers[thread.x].context, &scheduler); }

void wait(Barrier& barrier) {
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  fibers[thread.x].barrier = &barrier;
  fibers[thread.x].generation = barrier.generation;
  back_to_scheduler();
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

// Runs the threads of a warp as far as they come; how many ended, or -1 where none could run.
int run_warp(int warp) {
  int ended = 0;
  bool ran = false;
  for (bool ready = true; ready; ran = ran || ready) {
    ready = false;
    for (int t = warp * 32; t < warp * 32 + 32; ++t) {
      if (!fibers[t].ready()) continue;
      ready = true;
      thread.x = t;
      swapcontext(&scheduler, &fibers[t].context);
      ended += fibers[t].done;
    }
  }
  return ran ? ended : -1;
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
    fiber.barrier = nullptr;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    makecontext(&fiber.context, run_fiber, 0);
  }
  // One warp runs as far ahead of the others as barriers let it, the first and the last by turns.
  const int warps = threads / 32;
  for (int left = threads, turn = block.x; left > 0; ++turn) {
    bool stuck = true;
    for (int i = 0; i < warps; ++i) {
      const int ended = run_warp(turn % 2 ? warps - 1 - i : i);
      stuck = stuck && ended < 0;
      left -= ended > 0 ? ended : 0;
    }
    if (stuck) fail("the threads of a block wait for each other");
  }
  if (of_block.arrived) fail("a thread ended while others wait for it");
}

}  // namespace on_host
