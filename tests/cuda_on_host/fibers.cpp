// Runs the threads of a block as fibers on one thread of the host, warps in random order.
//
// For Python, which knows the addresses: which kernel another one stands for, what memory blocks
// share, where the random order begins, and the accesses that were noted.

#include <stdio.h>
#include <stdlib.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include <map>
#include <utility>
#include <vector>

#include "cuda_runtime.h"

// From one stack to another. ucontext's takes a system call each time, tens of times longer.
#if defined(__x86_64__)
struct Stack {
  void* top;  // while another one is in use
};
extern "C" void on_host_switch(void** from, void* to);
asm(R"(
  .text
on_host_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");
static void switch_stacks(Stack& from, Stack& to) { on_host_switch(&from.top, to.top); }
static void begin_stack(Stack& stack, char* memory, size_t size, void (*function)()) {
  void** end = (void**)((uintptr_t)(memory + size) / 16 * 16);
  end[-1] = nullptr;  // where the function, which never does, would return to
  end[-2] = (void*)function;
  for (int i = 3; i <= 8; ++i) end[-i] = nullptr;  // the registers that a switch restores
  stack.top = end - 8;
}
#else
typedef ucontext_t Stack;
static void switch_stacks(Stack& from, Stack& to) { swapcontext(&from, &to); }
static void begin_stack(Stack& stack, char* memory, size_t size, void (*function)()) {
  getcontext(&stack);
  stack.uc_stack.ss_sp = memory;
  stack.uc_stack.ss_size = size;
  makecontext(&stack, function, 0);
}
#endif

namespace on_host {

uint3 thread, block, block_size, grid_size;
double exchanged[2][1024];
unsigned turns[1024];
int any;
bool noting;

namespace {

constexpr size_t kStack = 256 << 10;  // holds a kernel's argument of 32 KB, by value

// Threads wait until as many as are expected have arrived.
struct Barrier {
  unsigned expected, arrived, generation;
};

struct Fiber {
  Stack stack;
  std::vector<char> memory;
  bool done;
  const Barrier* barrier;  // that it waits at, while its generation lasts
  unsigned generation;

  bool ready() const { return !done && !(barrier && barrier->generation == generation); }
};

struct Memory {
  char* begin;
  size_t size;
};

Fiber fibers[1024];
Stack scheduler;
Barrier of_block, of_warp[32];
const std::function<void()>* running;
uint32_t random_state = 1;
std::vector<Memory> shared_memory;
std::map<const void*, const PtxKernel*> stands_for;
std::vector<uint64_t> noted;  // instruction, thread, address, size of each access

uint32_t random_number() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 17;
  return random_state ^= random_state << 5;
}

void back_to_scheduler() { switch_stacks(fibers[thread.x].stack, scheduler); }

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
      switch_stacks(scheduler, fibers[t].stack);
      ended += fibers[t].done;
    }
  }
  return ran ? ended : -1;
}

void start(Fiber& fiber) {
  fiber.memory.resize(kStack);
  fiber.done = false;
  fiber.barrier = nullptr;
  begin_stack(fiber.stack, fiber.memory.data(), kStack, run_fiber);
}

}  // namespace

void block_barrier() { wait(of_block); }
void warp_barrier() { wait(of_warp[thread.x / 32]); }

void run_block(int threads, const std::function<void()>& kernel) {
  if (threads % 32) fail("a block is not made of whole warps");
  running = &kernel;
  block_size.x = threads;
  of_block = {(unsigned)threads, 0, 0};
  for (Barrier& barrier : of_warp) barrier = {32, 0, 0};
  for (int t = 0; t < threads; ++t) start(fibers[t]);
  // What a block finds in shared memory: not a number, or a large one, by turns.
  for (const Memory& memory : shared_memory)
    memset(memory.begin, random_number() % 2 ? 0xff : 0x7f, memory.size);
  // One warp runs as far ahead of the others as barriers let it, another one at each turn.
  int order[32];
  const int warps = threads / 32;
  for (int i = 0; i < warps; ++i) order[i] = i;
  for (int left = threads; left > 0;) {
    for (int i = warps - 1; i > 0; --i) std::swap(order[i], order[random_number() % (i + 1)]);
    bool stuck = true;
    for (int i = 0; i < warps; ++i) {
      const int ended = run_warp(order[i]);
      stuck = stuck && ended < 0;
      left -= ended > 0 ? ended : 0;
    }
    if (stuck) fail("the threads of a block wait for each other");
  }
  if (of_block.arrived) fail("a thread ended while others wait for it");
}

const PtxKernel* in_place_of(const void* kernel) {
  const auto found = stands_for.find(kernel);
  return found == stands_for.end() ? nullptr : found->second;
}

void note(int instruction, uintptr_t address, unsigned size) {
  noted.insert(noted.end(), {(uint64_t)instruction, thread.x, address, size});
}

}  // namespace on_host

extern "C" {

extern const char on_host_anchor;
const char on_host_anchor = 0;  // the address of a name in the library that Python knows too

void on_host_replace(const void* kernel, const on_host::PtxKernel* by) {
  if (by)
    on_host::stands_for[kernel] = by;
  else
    on_host::stands_for.erase(kernel);
}

// A launch of what runs in place of no kernel of this library.
void on_host_launch(const on_host::PtxKernel* kernel, unsigned x, unsigned y, unsigned threads,
                    char* parameters) {
  on_host::grid_size.x = x;
  for (on_host::block.y = 0; on_host::block.y < y; ++on_host::block.y)
    for (on_host::block.x = 0; on_host::block.x < x; ++on_host::block.x)
      on_host::run_block(threads, [&] { kernel->run(parameters); });
  on_host::block.y = 0;
}

void on_host_shares(char* begin, size_t size) { on_host::shared_memory.push_back({begin, size}); }

void on_host_seed(uint32_t seed) { on_host::random_state = seed ? seed : 1; }

// Notes accesses from now on (or no longer); where those are that were noted before, and how many.
const uint64_t* on_host_note(int on, size_t* count) {
  static std::vector<uint64_t> last;
  last.swap(on_host::noted);
  on_host::noted.clear();
  on_host::noting = on;
  *count = last.size() / 4;
  return last.data();
}
}
