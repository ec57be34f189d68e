// Blocks, warps and threads of a launch on one CPU thread: each GPU thread is a fiber, which runs
// until it waits for others, in a barrier or in what a warp does together. `set_order` says who
// goes on where several could:
//
//   0    the first warp that can, lane after lane; clusters and blocks of a grid in order
//   1    the same from the last to the first
//   >= 2 at random from this seed: warps, lanes, and whole blocks run ahead of others, up to the
//        next barrier that they cannot pass; clusters and blocks of a grid in any order
//
// What CUDA leaves undefined ends the launch with an error and a sentence in `message`, as does
// what a GPU would only punish sometimes:
//   - shared memory of another block of the cluster before that block runs or after it has ended
//     (its pages are locked); shared memory written behind its end
//   - an address outside of all memory, when the caller has put locked pages around its tensors
//   - a misaligned access, where this is compiled with -fsanitize=alignment and traps
//   - a lane that shuffles under a mask without itself, with others under another mask, or that
//     reads a lane which takes no part
//   - threads that wait for threads or messages which never come; cluster barriers arrived at twice
// Shared memory starts as NaNs.
#pragma once

#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <utility>
#include <vector>

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace dafl::cuda {
constexpr size_t kMostShared = 48 << 10, kGuard = 4096;
extern __attribute__((aligned(16))) char dafl_shared[kMostShared + kGuard];
}  // namespace dafl::cuda

namespace emulation {

using dafl::cuda::dafl_shared;
using dafl::cuda::kGuard;
using dafl::cuda::kMostShared;

constexpr size_t kWindow = kMostShared + kGuard, kStack = 64 << 10, kLeastStack = 8 << 10;
constexpr unsigned kMostBlocks = 8, kLanes = 32;
constexpr uint64_t kForward = 0, kReversed = 1;

enum Wait { kRunnable, kWarp, kBlock, kCluster, kMailbox, kDone };
enum Together { kSync, kShuffle, kBallot, kAny, kAll, kAdd, kMin, kMax, kMinSigned, kMaxSigned };

// Once it runs, switches are jumps, which save no signal mask and so cost no system call. When its
// thread ends it takes the place of one in the next block.
struct Fiber {
  jmp_buf at;
  bool started = false;
  unsigned block, thread;  // block: its rank in the cluster
  Wait wait;
  // What it does together with its warp.
  Together what;
  unsigned mask, lane;  // lane: whose value it wants
  uint64_t value, result;
  // The cluster barrier that it has arrived at and not yet waited for.
  bool arrived;
  uint64_t ticket;
  int64_t mailbox;  // that it waits for, as an offset in shared memory
};

struct Warp {
  unsigned runnable, waiting, done;  // lanes
  uint64_t key;                      // the lowest goes first
};

struct Block {
  enum { kNew, kRunning, kEnded } state;
  unsigned waiting, done;  // threads
  uint64_t key;
};

inline uint64_t order = kForward, random_state;
inline int64_t first_block_run = 0, last_block_run = INT64_MAX;  // others of a grid are left out

inline char message[400];
inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline std::vector<Block> group;  // the cluster's blocks
inline char *stacks = nullptr, *windows = nullptr;
inline ucontext_t scheduler_context;
inline jmp_buf scheduler, escape;
inline Fiber* current;
inline bool in_kernel;
inline int resident;  // whose shared memory stands in dafl_shared; others' are in the windows
inline std::function<void()> body;
inline unsigned blocks, threads;
inline int64_t first_block;
inline unsigned cluster_waiting;
inline uint64_t cluster_phase;
inline size_t used;  // dynamic shared memory of the launch

inline void set_order(uint64_t seed) { order = random_state = seed; }

inline uint64_t draw() {  // splitmix64
  uint64_t z = (random_state += 0x9e3779b97f4a7c15u);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

[[noreturn]] inline void fail(const char* what) {
  if (in_kernel) {
    snprintf(message, sizeof message, "%s (block %lld, thread %u)", what,
             static_cast<long long>(first_block + current->block), current->thread);
  } else {
    snprintf(message, sizeof message, "%s", what);
  }
  _longjmp(escape, 1);
}

inline void on_signal(int signal, siginfo_t* info, void*) {
  if (!in_kernel) {  // not ours
    ::signal(signal, SIG_DFL);
    return;
  }
  char text[200];
  if (signal == SIGILL) fail("a misaligned access");
  const char* at = static_cast<char*>(info->si_addr);
  const int64_t window =
      windows == nullptr || at < windows ? -1 : (at - windows) / int64_t(kWindow);
  if (window >= 0 && window < kMostBlocks) {
    const bool ended = window < blocks && group[window].state == Block::kEnded;
    snprintf(text, sizeof text, "shared memory of the cluster's block %d, which %s",
             static_cast<int>(window), ended ? "has ended" : "does not run yet");
  } else {
    snprintf(text, sizeof text, "address %p is not the kernel's", static_cast<const void*>(at));
  }
  fail(text);
}

inline void switch_out() {
  // A frame close to the stack's end means that the kernel has written behind it.
  Fiber* self = current;
  const char* here = static_cast<char*>(__builtin_frame_address(0));
  if (here < stacks + (self - fibers.data()) * kStack + kLeastStack)
    fail("the fiber's stack is full");
  if (_setjmp(self->at) == 0) _longjmp(scheduler, 1);
}

inline void entry() {
  for (;;) {
    body();
    current->wait = kDone;
    switch_out();
  }
}

// ---- Shared memory -----------------------------------------------------------------------------

inline void lock_window(unsigned block, bool locked) {
  if (blocks > 1)
    mprotect(windows + block * kWindow, kWindow, locked ? PROT_NONE : PROT_READ | PROT_WRITE);
}

inline bool pattern_at(const char* from, const char* to) {
  for (; from < to; ++from) {
    if (*from != 0x5a) return false;
  }
  return true;
}

inline void end_block(unsigned block) {
  group[block].state = Block::kEnded;
  if (!pattern_at(dafl_shared + used, dafl_shared + kWindow) ||
      (blocks > 1 &&
       !pattern_at(windows + block * kWindow + used, windows + (block + 1) * kWindow))) {
    fail("shared memory was written behind its end");
  }
  lock_window(block, true);
  resident = -1;
}

inline void make_resident(unsigned block) {
  if (resident == static_cast<int>(block)) return;
  char* window = windows + block * kWindow;
  if (resident >= 0) memcpy(windows + resident * kWindow, dafl_shared, used);
  if (group[block].state == Block::kNew) {
    group[block].state = Block::kRunning;
    lock_window(block, false);
    memset(dafl_shared, 0xff, used);
  } else {
    memcpy(dafl_shared, window, used);
  }
  resident = block;
  const int64_t index = first_block + block;
  blockIdx = dim3(index % gridDim.x, index / gridDim.x, 0);
}

// ---- Waiting -----------------------------------------------------------------------------------

inline void wake(size_t fiber) {
  fibers[fiber].wait = kRunnable;
  warps[fiber / kLanes].runnable |= 1u << fiber % kLanes;
}

inline void wait_for_block() {
  Block& block = group[current->block];
  current->wait = kBlock;
  if (++block.waiting == threads) {
    block.waiting = 0;
    for (unsigned i = 0; i < threads; ++i) wake(current->block * threads + i);
  }
  switch_out();
}

inline void arrive_at_cluster() {
  if (current->arrived) fail("arrives at a cluster barrier a second time before waiting for it");
  current->arrived = true;
  current->ticket = cluster_phase;
  if (++cluster_waiting == blocks * threads) {
    cluster_waiting = 0;
    ++cluster_phase;
    for (unsigned i = 0; i < blocks * threads; ++i) {
      if (fibers[i].wait == kCluster) wake(i);
    }
  }
}

inline void wait_for_cluster() {
  if (!current->arrived) fail("waits for a cluster barrier without having arrived at it");
  current->arrived = false;
  if (current->ticket != cluster_phase) return;
  current->wait = kCluster;
  switch_out();
}

// A barrier in shared memory that counts the bytes sent to it (CUDA's mbarrier): a phase ends when
// somebody has said how many to expect, and that many have come.
struct Mailbox {
  int32_t missing;  // bytes; fewer than none where they come before they are expected
  uint16_t expected, phase;
};

inline Mailbox& open_mailbox(void* at) {
  Mailbox& box = *static_cast<Mailbox*>(at);
  if (box.expected > 1) fail("a mailbox is used before it is opened");
  return box;
}

inline void change_mailbox(unsigned block, int64_t offset, int bytes, bool expect) {
  char* base = static_cast<int>(block) == resident ? dafl_shared : windows + block * kWindow;
  Mailbox& box = open_mailbox(base + offset);
  if (expect && box.expected) fail("a mailbox is told twice in a phase what to expect");
  box.missing += bytes;
  box.expected |= expect;
  if (!box.expected || box.missing != 0) return;
  box.expected = 0;
  ++box.phase;
  for (unsigned i = block * threads; i < (block + 1) * threads; ++i) {
    if (fibers[i].wait == kMailbox && fibers[i].mailbox == offset) wake(i);
  }
}

// Until the phase of this parity has ended.
inline void wait_for_mailbox(int64_t offset, unsigned parity) {
  while ((open_mailbox(dafl_shared + offset).phase & 1) == parity) {
    current->wait = kMailbox;
    current->mailbox = offset;
    switch_out();
  }
}

inline uint64_t combined(Together what, const Fiber* lanes, unsigned mask, unsigned lane) {
  if (what == kSync) return 0;
  if (what == kShuffle) return lanes[lanes[lane].lane].value;
  uint64_t result = 0;
  bool first = true;
  for (unsigned i = 0; i < kLanes; ++i) {
    if (!(mask >> i & 1)) continue;
    const uint64_t value = lanes[i].value;
    const unsigned a = static_cast<unsigned>(result), b = static_cast<unsigned>(value);
    switch (what) {
      case kBallot:
        result |= static_cast<uint64_t>(value != 0) << i;
        break;
      case kAny:
        result |= value != 0;
        break;
      case kAll:
        result = (first || result) && value != 0;
        break;
      case kAdd:
        result = a + b;
        break;
      case kMin:
        result = first || b < a ? b : a;
        break;
      case kMax:
        result = first || b > a ? b : a;
        break;
      case kMinSigned:
        result = first || static_cast<int>(b) < static_cast<int>(a) ? b : a;
        break;
      default:
        result = first || static_cast<int>(b) > static_cast<int>(a) ? b : a;
    }
    first = false;
  }
  return result;
}

// What the lanes that `mask` names do together, as soon as the last of them is there.
inline uint64_t together(Together what, unsigned mask, uint64_t value, unsigned wanted) {
  Fiber* self = current;
  const unsigned index = self - fibers.data(), own = index % kLanes;
  Fiber* lanes = self - own;
  Warp& warp = warps[index / kLanes];
  if (!(mask >> own & 1)) fail("a lane shuffles under a mask that does not name it");
  if (mask & warp.done) fail("a shuffle's mask names a lane that has returned");
  if (what == kShuffle && !(mask >> wanted & 1))
    fail("reads a lane that is not in the shuffle's mask");
  self->what = what;
  self->mask = mask;
  self->lane = wanted;
  self->value = value;
  self->wait = kWarp;
  warp.waiting |= 1u << own;
  bool complete = (warp.waiting & mask) == mask;
  for (unsigned i = 0; i < kLanes; ++i) {
    if (!((warp.waiting & mask) >> i & 1)) continue;
    if (lanes[i].mask != mask) {
      if (lanes[i].mask >> own & 1) fail("lanes of a warp meet under different masks");
      complete = false;
    } else if (lanes[i].what != what) {
      fail("lanes of a warp meet in different operations");
    }
  }
  if (complete) {
    for (unsigned i = 0; i < kLanes; ++i) {
      if (mask >> i & 1) lanes[i].result = combined(what, lanes, mask, i);
    }
    warp.waiting &= ~mask;
    for (unsigned i = 0; i < kLanes; ++i) {
      if (mask >> i & 1) wake(index - own + i);
    }
  }
  switch_out();
  return self->result;
}

// ---- Running -----------------------------------------------------------------------------------

inline void resume(unsigned index) {
  Fiber& fiber = fibers[index];
  make_resident(fiber.block);
  current = &fiber;
  threadIdx.x = fiber.thread;
  in_kernel = true;
  if (_setjmp(scheduler) == 0) {
    if (fiber.started) _longjmp(fiber.at, 1);
    fiber.started = true;
    static ucontext_t context;  // used up by the start
    getcontext(&context);
    context.uc_stack.ss_sp = stacks + index * kStack;
    context.uc_stack.ss_size = kStack;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
    swapcontext(&scheduler_context, &context);
  }
  in_kernel = false;
}

inline uint64_t key_of(unsigned index, unsigned count) {
  return order == kForward ? index : order == kReversed ? count - 1 - index : draw() >> 32;
}

// Lets every lane of a warp that can go on do so once.
inline void step(unsigned index) {
  Warp& warp = warps[index];
  const unsigned todo = warp.runnable;
  const unsigned shift = order > kReversed ? draw() % kLanes : 0;
  const unsigned stride = order > kReversed ? draw() | 1 : 1;
  for (unsigned n = 0; n < kLanes; ++n) {
    const unsigned lane = order == kReversed ? kLanes - 1 - n : (shift + n * stride) % kLanes;
    if (!(todo >> lane & 1)) continue;
    const unsigned fiber = index * kLanes + lane;
    warp.runnable &= ~(1u << lane);
    resume(fiber);
    if (fibers[fiber].wait != kDone) continue;
    warp.done |= 1u << lane;
    const unsigned block = fibers[fiber].block;
    if (++group[block].done == threads) end_block(block);
  }
}

inline void run_cluster() {
  const unsigned count = blocks * threads;
  for (unsigned i = 0; i < count; ++i) {
    Fiber& fiber = fibers[i];
    fiber.block = i / threads;
    fiber.thread = i % threads;
    fiber.wait = kRunnable;
    fiber.arrived = false;
  }
  const bool whole_blocks = order <= kReversed || draw() % 2;
  for (unsigned b = 0; b < blocks; ++b) {
    group[b] = {Block::kNew, 0, 0, whole_blocks ? key_of(b, blocks) : 0};
  }
  for (unsigned w = 0; w < warps.size(); ++w) warps[w] = {~0u, 0, 0, key_of(w, warps.size())};
  cluster_waiting = 0;
  cluster_phase = 0;
  resident = -1;
  for (unsigned ended = 0; ended < blocks;) {
    int next = -1;
    uint64_t lowest = 0;
    for (unsigned w = 0; w < warps.size(); ++w) {
      if (warps[w].runnable == 0) continue;
      const uint64_t key = (group[w * kLanes / threads].key << 32) + warps[w].key;
      if (next < 0 || key < lowest) next = w, lowest = key;
    }
    if (next < 0) fail("threads wait for threads that never come");
    step(next);
    if (order > kReversed) {
      const uint64_t dice = draw() % 64;
      if (dice < 8) warps[next].key = draw() >> 32;
      if (dice == 8 && whole_blocks) group[next * kLanes / threads].key = draw() >> 33;
    }
    ended = 0;
    for (unsigned b = 0; b < blocks; ++b) ended += group[b].state == Block::kEnded;
  }
}

inline void* map(size_t bytes, int protection) {
  void* at = mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED) abort();
  return at;
}

inline void forget_fibers() {
  for (Fiber& fiber : fibers) fiber.started = false;
}

inline void prepare() {
  const size_t count = static_cast<size_t>(blocks) * threads;
  if (fibers.size() < count) {
    if (stacks != nullptr) munmap(stacks, fibers.size() * kStack);
    stacks = static_cast<char*>(map(count * kStack, PROT_READ | PROT_WRITE));
    fibers.resize(count);
    forget_fibers();
  }
  warps.resize(count / kLanes);
  group.resize(blocks);
  if (windows == nullptr) windows = static_cast<char*>(map(kMostBlocks * kWindow, PROT_NONE));
  memset(dafl_shared, 0x5a, kWindow);
  if (blocks > 1) {
    mprotect(windows, blocks * kWindow, PROT_READ | PROT_WRITE);
    memset(windows, 0x5a, blocks * kWindow);
    for (unsigned b = 0; b < blocks; ++b) {
      memset(windows + b * kWindow, 0xff, used);
      lock_window(b, true);
    }
  }
}

inline void run_clusters() {
  const int64_t total = static_cast<int64_t>(gridDim.x) * gridDim.y / blocks;
  std::vector<int64_t> turns;
  for (int64_t i = 0; i < total; ++i) {
    const int64_t turn = order == kReversed ? total - 1 - i : i;
    if (turn * blocks >= first_block_run && turn * blocks <= last_block_run) turns.push_back(turn);
  }
  if (order > kReversed) {
    for (size_t i = turns.size(); i > 1; --i) std::swap(turns[i - 1], turns[draw() % i]);
  }
  for (int64_t turn : turns) {
    first_block = turn * blocks;
    run_cluster();
  }
}

// Whether the launch went well; otherwise `message` says why not.
inline bool run(dim3 grid, dim3 block, unsigned cluster, size_t shared) {
  static char signal_stack[64 << 10];
  gridDim = grid;
  blockDim = block;
  blocks = cluster;
  threads = block.x;
  used = shared;
  in_kernel = false;
  threadIdx = dim3(0, 0, 0);
  stack_t ours{}, theirs{};
  ours.ss_sp = signal_stack;
  ours.ss_size = sizeof signal_stack;
  struct sigaction action{}, before[3];
  const int signals[] = {SIGSEGV, SIGBUS, SIGILL};
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  sigaltstack(&ours, &theirs);
  for (int i = 0; i < 3; ++i) sigaction(signals[i], &action, &before[i]);
  bool good = false;
  if (_setjmp(escape) == 0) {
    if (used > kMostShared || threads == 0 || threads % kLanes != 0 || threads > 1024 ||
        block.y * block.z != 1 || cluster == 0 || cluster > kMostBlocks || grid.x == 0 ||
        grid.x % cluster != 0 || grid.y == 0 || grid.y > 65535 || grid.z != 1) {
      fail("a launch that no GPU accepts");
    }
    prepare();
    run_clusters();
    good = true;
  } else {
    in_kernel = false;
    forget_fibers();
  }
  for (int i = 0; i < 3; ++i) sigaction(signals[i], &before[i], nullptr);
  sigaltstack(&theirs, nullptr);
  return good;
}

}  // namespace emulation
