// Which part of which tensor a thread block works on.
//
// Every tensor is cut into tiles; a table of the tensors travels by value as the kernel's
// argument, and a block finds its tile there by binary search. More tensors than fit take more
// launches. Plain C++ but for the call into `locate` from kernels, so that it is tested without
// a GPU.
#pragma once

#include <limits.h>
#include <stdint.h>

#include <algorithm>
#include <vector>

#include "../arithmetic.h"
#include "../check.h"
#include "../imbsam.h"

namespace imbsam {
namespace cuda {

// What a kernel's arguments may take: sm_70 and newer, built with CUDA 12.1 or newer.
constexpr int kArgumentBytes = 32764;
constexpr int kOtherArgumentBytes = 256;  // what a kernel takes besides the table

template <int kLists>
struct TensorTable {
  static constexpr int kCapacity =
      (kArgumentBytes - kOtherArgumentBytes) / (kLists * (int)sizeof(void*) + 12);

  void* data[kLists][kCapacity];      // null: the list is absent
  int64_t numel[kCapacity];           // never 0: empty tensors are left out
  int32_t first_tile[kCapacity + 1];  // of each tensor; then the number of all tiles
  int32_t count;                      // tensors
};

// The tensors begin .. end - 1 of a call, which one launch covers.
struct Batch {
  int64_t begin, end;
  int64_t first_tile;  // tiles of the tensors before
  int32_t tiles;
};

inline int64_t tiles_of(int64_t numel, int64_t tile) { return (numel + tile - 1) / tile; }

// The launches of a call, with at most `capacity` tensors each; none where all are empty.
inline std::vector<Batch> batches(const Table& tensors, int capacity, int64_t tile) {
  std::vector<Batch> found;
  Batch batch = {0, 0, 0, 0};
  int64_t tiles = 0;
  int count = 0;
  const auto close = [&](int64_t end) {
    batch.end = end;
    batch.tiles = (int32_t)tiles;
    if (tiles) found.push_back(batch);
    batch = {end, end, batch.first_tile + tiles, 0};
    tiles = count = 0;
  };
  for (int64_t i = 0; i < tensors.count; ++i) {
    const int64_t more = tiles_of(tensors.numel[i], tile);
    IMBSAM_CHECK(more <= INT_MAX, "a tensor has " << tensors.numel[i] << " elements, expected at "
                                                  << "most " << INT_MAX << " times " << tile);
    if (more && (count == capacity || tiles + more > INT_MAX)) close(i);
    tiles += more;
    count += more > 0;
  }
  close(tensors.count);
  return found;
}

// lists[l] points to the data pointers of list l, or is null.
template <int kLists>
void fill(TensorTable<kLists>& table, const Batch& batch, const Table& tensors,
          const void* const* const (&lists)[kLists], int64_t tile) {
  int64_t tiles = 0;
  table.count = 0;
  for (int64_t i = batch.begin; i < batch.end; ++i) {
    if (tensors.numel[i] == 0) continue;
    for (int l = 0; l < kLists; ++l)
      table.data[l][table.count] = lists[l] ? const_cast<void*>(lists[l][i]) : nullptr;
    table.numel[table.count] = tensors.numel[i];
    table.first_tile[table.count++] = (int32_t)tiles;
    tiles += tiles_of(tensors.numel[i], tile);
  }
  table.first_tile[table.count] = (int32_t)tiles;
}

// The part of one tensor that a tile covers.
struct Tile {
  int32_t tensor;  // in the table
  int64_t begin;   // its first element in the tensor
  int32_t elements;
};

template <int kLists>
IMBSAM_INLINE Tile locate(const TensorTable<kLists>& table, int32_t tile, int32_t tile_elements) {
  int32_t tensor = 0, after = table.count;  // first_tile[tensor] <= tile < first_tile[after]
  while (after - tensor > 1) {
    const int32_t middle = (tensor + after) / 2;
    if (table.first_tile[middle] <= tile)
      tensor = middle;
    else
      after = middle;
  }
  const int64_t begin = (int64_t)(tile - table.first_tile[tensor]) * tile_elements;
  const int64_t left = table.numel[tensor] - begin;
  return {tensor, begin, (int32_t)(left < tile_elements ? left : tile_elements)};
}

}  // namespace cuda
}  // namespace imbsam
