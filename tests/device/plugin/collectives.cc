// Collectives between processes of one machine over shared memory. All ranks of a group enter each call in step.
#include <fcntl.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "device.h"
#include "paddle/phi/common/bfloat16.h"
#include "paddle/phi/common/float16.h"

namespace sandbox {
namespace {

constexpr size_t kSlot = size_t{1} << 18;  // bytes a rank offers at a time
constexpr size_t kIdSize = 64;

struct Mailbox {  // from one rank to another, one message piece at a time
  std::atomic<uint32_t> full;
  char bytes[kSlot / 4];
};

struct Board {  // at the head of the shared memory; all zero at first
  std::atomic<uint32_t> arrived, turn;
};

struct Comm {
  std::string name;
  size_t ranks, rank, bytes;
  Board* board;
  char* slots;
  Mailbox* mail;  // [from][to]

  char* slot(size_t of) const { return slots + of * kSlot; }
  Mailbox& box(size_t from, size_t to) const { return mail[from * ranks + to]; }

  void barrier() const {
    uint32_t turn = board->turn;
    if (++board->arrived == ranks) {
      board->arrived = 0;
      ++board->turn;
    } else {
      while (board->turn == turn) sched_yield();
    }
  }
};

Comm* world = nullptr;  // the first group, that of all ranks

Comm* cast(C_CCLComm comm) { return reinterpret_cast<Comm*>(comm); }

template <class T, class Wide>
void reduce_into(Wide* sum, const T* part, size_t count, C_CCLReduceOp op) {
  for (size_t k = 0; k < count; ++k) {
    Wide value = static_cast<Wide>(part[k]);
    switch (op) {
      case SUM: case AVG: sum[k] += value; break;
      case MAX: sum[k] = std::max(sum[k], value); break;
      case MIN: sum[k] = std::min(sum[k], value); break;
      case PRODUCT: sum[k] *= value; break;
    }
  }
}

// Rank after rank in order, in float for the half types, so that every rank gets the same bits.
template <class T, class Wide = T>
void reduce_slots(const Comm& comm, void* to, size_t count, C_CCLReduceOp op) {
  std::vector<Wide> sum(count);
  const T* first = reinterpret_cast<const T*>(comm.slot(0));
  for (size_t k = 0; k < count; ++k) sum[k] = static_cast<Wide>(first[k]);
  for (size_t rank = 1; rank < comm.ranks; ++rank)
    reduce_into(sum.data(), reinterpret_cast<const T*>(comm.slot(rank)), count, op);
  T* out = static_cast<T*>(to);
  for (size_t k = 0; k < count; ++k)
    out[k] = static_cast<T>(op == AVG ? static_cast<Wide>(sum[k] / static_cast<Wide>(comm.ranks)) : sum[k]);
}

void reduce(const Comm& comm, void* to, size_t count, C_DataType dtype, C_CCLReduceOp op) {
  switch (dtype) {
    case FLOAT32: return reduce_slots<float>(comm, to, count, op);
    case FLOAT64: return reduce_slots<double>(comm, to, count, op);
    case FLOAT16: return reduce_slots<phi::dtype::float16, float>(comm, to, count, op);
    case BFLOAT16: return reduce_slots<phi::dtype::bfloat16, float>(comm, to, count, op);
    case INT32: return reduce_slots<int32_t>(comm, to, count, op);
    case INT64: return reduce_slots<int64_t>(comm, to, count, op);
    case UINT8: case BOOL: return reduce_slots<uint8_t, int32_t>(comm, to, count, op);
    case INT8: return reduce_slots<int8_t, int32_t>(comm, to, count, op);
    default: die("a reduction of a type that it does not know");
  }
}

// Calls piece(offset, bytes) for the whole message, at most a slot at a time and whole elements.
template <class Piece>
void in_pieces(size_t bytes, size_t limit, Piece piece) {
  for (size_t start = 0; start < bytes; start += limit) piece(start, std::min(limit, bytes - start));
}

C_Status init_rank(size_t ranks, C_CCLRootId* id, size_t rank, C_CCLComm* out) {
  auto* comm = new Comm;
  comm->name.assign(static_cast<const char*>(id->data), strnlen(static_cast<const char*>(id->data), id->sz));
  comm->ranks = ranks, comm->rank = rank;
  comm->bytes = kSlot + ranks * kSlot + ranks * ranks * sizeof(Mailbox);
  int file = shm_open(comm->name.c_str(), O_RDWR | O_CREAT, 0600);
  if (file < 0 || ftruncate(file, static_cast<off_t>(comm->bytes)) != 0) die("no shared memory", comm->name.c_str());
  void* shared = mmap(nullptr, comm->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  if (shared == MAP_FAILED) die("shared memory cannot be mapped", comm->name.c_str());
  close(file);
  comm->board = static_cast<Board*>(shared);
  comm->slots = static_cast<char*>(shared) + kSlot;
  comm->mail = reinterpret_cast<Mailbox*>(comm->slots + ranks * kSlot);
  comm->barrier();  // all have it open: the name can go, and nothing stays behind however the processes end
  if (rank == 0) shm_unlink(comm->name.c_str());
  *out = reinterpret_cast<C_CCLComm>(comm);
  if (!world) world = comm;
  return C_SUCCESS;
}

C_Status all_reduce(void* from, void* to, size_t count, C_DataType dtype, C_CCLReduceOp op, C_CCLComm handle,
                    C_Stream) {
  counters.collective_calls++;
  const Comm& comm = *cast(handle);
  const char* source = static_cast<char*>(alias(from));
  char* target = static_cast<char*>(alias(to));
  in_pieces(count * size_of(dtype), kSlot, [&](size_t start, size_t bytes) {
    std::memcpy(comm.slot(comm.rank), source + start, bytes);
    comm.barrier();
    reduce(comm, target + start, bytes / size_of(dtype), dtype, op);
    comm.barrier();
  });
  return C_SUCCESS;
}

C_Status reduce_to(void* from, void* to, size_t count, C_DataType dtype, C_CCLReduceOp op, size_t root,
                   C_CCLComm handle, C_Stream) {
  counters.collective_calls++;
  const Comm& comm = *cast(handle);
  const char* source = static_cast<char*>(alias(from));
  in_pieces(count * size_of(dtype), kSlot, [&](size_t start, size_t bytes) {
    std::memcpy(comm.slot(comm.rank), source + start, bytes);
    comm.barrier();
    if (comm.rank == root)
      reduce(comm, static_cast<char*>(alias(to)) + start, bytes / size_of(dtype), dtype, op);
    comm.barrier();
  });
  return C_SUCCESS;
}

C_Status broadcast(void* buffer, size_t count, C_DataType dtype, size_t root, C_CCLComm handle, C_Stream) {
  counters.collective_calls++;
  const Comm& comm = *cast(handle);
  char* mine = static_cast<char*>(alias(buffer));
  in_pieces(count * size_of(dtype), kSlot, [&](size_t start, size_t bytes) {
    if (comm.rank == root) std::memcpy(comm.slot(root), mine + start, bytes);
    comm.barrier();
    if (comm.rank != root) std::memcpy(mine + start, comm.slot(root), bytes);
    comm.barrier();
  });
  return C_SUCCESS;
}

C_Status all_gather(void* from, void* to, size_t count, C_DataType dtype, C_CCLComm handle, C_Stream) {
  counters.collective_calls++;
  const Comm& comm = *cast(handle);
  const char* source = static_cast<char*>(alias(from));
  char* target = static_cast<char*>(alias(to));
  size_t whole = count * size_of(dtype);
  in_pieces(whole, kSlot, [&](size_t start, size_t bytes) {
    std::memcpy(comm.slot(comm.rank), source + start, bytes);
    comm.barrier();
    for (size_t rank = 0; rank < comm.ranks; ++rank)
      std::memcpy(target + rank * whole + start, comm.slot(rank), bytes);
    comm.barrier();
  });
  return C_SUCCESS;
}

C_Status reduce_scatter(void* from, void* to, size_t count, C_DataType dtype, C_CCLReduceOp op, C_CCLComm handle,
                        C_Stream) {
  counters.collective_calls++;
  const Comm& comm = *cast(handle);
  const char* source = static_cast<char*>(alias(from));
  size_t whole = count * size_of(dtype);  // of one rank's share
  for (size_t owner = 0; owner < comm.ranks; ++owner)
    in_pieces(whole, kSlot, [&](size_t start, size_t bytes) {
      std::memcpy(comm.slot(comm.rank), source + owner * whole + start, bytes);
      comm.barrier();
      if (comm.rank == owner)
        reduce(comm, static_cast<char*>(alias(to)) + start, bytes / size_of(dtype), dtype, op);
      comm.barrier();
    });
  return C_SUCCESS;
}

// Messages between two ranks. Between group_start and group_end they are collected and then move side by side, so that
// ranks which all send first do not wait for each other for ever.
struct Message {
  bool send;
  char* bytes;
  size_t left;
  Mailbox* box;

  bool move() {  // one piece if the mailbox allows; whether anything is left
    if (left && (box->full != 0) != send) {
      size_t piece = std::min(left, sizeof(Mailbox::bytes));
      if (send) std::memcpy(box->bytes, bytes, piece);
      else std::memcpy(bytes, box->bytes, piece);
      bytes += piece, left -= piece;
      box->full = send;
    }
    return left != 0;
  }
};
thread_local int group_depth = 0;
thread_local std::vector<Message> waiting;

void deliver() {
  for (bool more = true; more; sched_yield()) {
    more = false;
    std::vector<Mailbox*> busy;  // a later message of the same pair must not overtake
    for (Message& message : waiting) {
      bool first = std::find(busy.begin(), busy.end(), message.box) == busy.end();
      bool left = first ? message.move() : message.left != 0;
      if (left) busy.push_back(message.box);
      more |= left;
    }
  }
  waiting.clear();
}

C_Status post(bool send, void* buffer, size_t bytes, Mailbox& box) {
  counters.collective_calls++;
  waiting.push_back({send, static_cast<char*>(alias(buffer)), bytes, &box});
  if (group_depth == 0) deliver();
  return C_SUCCESS;
}

C_Status all_to_all(const void** from, const size_t* from_counts, const C_DataType* from_types, void** to,
                    const size_t* to_counts, const C_DataType* to_types, size_t rank, size_t ranks, C_CCLComm handle,
                    C_Stream) {
  const Comm& comm = *cast(handle);
  ++group_depth;
  for (size_t other = 0; other < ranks; ++other) {
    post(true, const_cast<void*>(from[other]), from_counts[other] * size_of(from_types[other]), comm.box(rank, other));
    post(false, to[other], to_counts[other] * size_of(to_types[other]), comm.box(other, rank));
  }
  if (--group_depth == 0) deliver();
  return C_SUCCESS;
}

template <class T, class Wide = float>
void axpby_as(size_t count, float alpha, const void* x, float beta, void* y) {
  const T* from = static_cast<const T*>(x);
  T* to = static_cast<T*>(y);
  for (size_t k = 0; k < count; ++k)
    to[k] = static_cast<T>(Wide(alpha) * static_cast<Wide>(from[k]) + Wide(beta) * static_cast<Wide>(to[k]));
}

}  // namespace

void world_sum(double* values, size_t count) {
  if (!world) return;
  in_pieces(count * sizeof(double), kSlot, [&](size_t start, size_t bytes) {
    char* mine = reinterpret_cast<char*>(values) + start;
    std::memcpy(world->slot(world->rank), mine, bytes);
    world->barrier();
    reduce(*world, mine, bytes / sizeof(double), FLOAT64, SUM);
    world->barrier();
  });
}

void axpby(C_DataType dtype, size_t count, float alpha, const void* x, float beta, void* y) {
  switch (dtype) {
    case FLOAT32: return axpby_as<float>(count, alpha, x, beta, y);
    case FLOAT64: return axpby_as<double, double>(count, alpha, x, beta, y);
    case FLOAT16: return axpby_as<phi::dtype::float16>(count, alpha, x, beta, y);
    case BFLOAT16: return axpby_as<phi::dtype::bfloat16>(count, alpha, x, beta, y);
    default: die("axpby of a type that it does not know");
  }
}

void fill_collectives(C_DeviceInterface* i) {
  i->xccl_get_comm_name = [](C_CCLComm comm, char* name) {
    std::strncpy(name, cast(comm)->name.c_str(), kIdSize);
    return C_SUCCESS;
  };
  i->xccl_get_unique_id_size = [](size_t* size) { return *size = kIdSize, C_SUCCESS; };
  i->xccl_get_unique_id = [](C_CCLRootId* id) {
    static std::atomic<int> number{0};
    std::string name = "/sandbox-" + std::to_string(getpid()) + "-" + std::to_string(number++);
    std::memset(id->data, 0, id->sz);
    std::memcpy(id->data, name.data(), std::min(name.size(), id->sz - 1));
    return C_SUCCESS;
  };
  i->xccl_comm_init_rank = init_rank;
  i->xccl_destroy_comm = [](C_CCLComm comm) {
    if (world == cast(comm)) world = nullptr;
    munmap(cast(comm)->board, cast(comm)->bytes);
    delete cast(comm);
    return C_SUCCESS;
  };
  i->xccl_all_reduce = all_reduce;
  i->xccl_broadcast = broadcast;
  i->xccl_reduce = reduce_to;
  i->xccl_all_gather = all_gather;
  i->xccl_reduce_scatter = reduce_scatter;
  i->xccl_group_start = [] { return ++group_depth, C_SUCCESS; };
  i->xccl_group_end = [] {
    if (--group_depth == 0) deliver();
    return C_SUCCESS;
  };
  i->xccl_send = [](void* buffer, size_t count, C_DataType dtype, size_t to, C_CCLComm comm, C_Stream) {
    return post(true, buffer, count * size_of(dtype), cast(comm)->box(cast(comm)->rank, to));
  };
  i->xccl_recv = [](void* buffer, size_t count, C_DataType dtype, size_t from, C_CCLComm comm, C_Stream) {
    return post(false, buffer, count * size_of(dtype), cast(comm)->box(from, cast(comm)->rank));
  };
  i->xccl_all_to_all = all_to_all;
}

}  // namespace sandbox
