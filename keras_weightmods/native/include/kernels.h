// What an instruction set provides to matmul.cc: one table of functions. The
// code behind all of them is the templates of kernels_impl.h. On x86 they need
// GCC 11 or clang 13.

#ifndef KWM_KERNELS_H_
#define KWM_KERNELS_H_

#include <type_traits>

#include "layout.h"

// Switches the compiler to instructions, up to the end of a file or of a part.
#define KWM_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define KWM_TARGET(names)                                             \
  KWM_PRAGMA(clang attribute push(__attribute__((target(names))), \
                                  apply_to = function))
#define KWM_END_TARGET KWM_PRAGMA(clang attribute pop)
#else
#define KWM_TARGET(names) KWM_PRAGMA(GCC target(names))
#define KWM_END_TARGET
#endif

namespace kwm {

// Kernels for bfloat16 activations and values, many rows at once, lanes are the
// rows: a tile of `vectors` vectors of 16, which are 2 or 4. Words are two
// bfloat16, the first in the low half.
struct BFloat16Kernels {
  // A tile [row_blocks, 16, 16 * vectors] of words: the transpose of `rows`
  // rows of x, (rows, k). Zero where there is nothing to copy.
  void (*pack)(const uint16_t* x, int64_t rows, int64_t k, int vectors,
               uint32_t* tile);

  // pairs [row_blocks, 8, kPairs, 16 * vectors] of blocks of rows of a tile: of
  // each group those that rising indices can name.
  static constexpr int kPairs = 6;
  void (*pairs_of_rows)(const uint32_t* tile, int64_t row_blocks, int vectors,
                        uint32_t* pairs);

  // Of each block of rows the pairs of values [16, 8], and words [16]: bits 4g
  // to 4g + 3 are the place of pair g among the kPairs of its group.
  static constexpr int kColumnWords = kLanes * (8 + 1);
  void (*pairs_of_columns)(const void* values, const uint32_t* meta,
                           int64_t row_blocks, uint32_t* columns);

  // y [16, 16 * vectors] (+)= these columns^T @ these rows
  void (*multiply)(const uint32_t* pairs, const uint32_t* columns,
                   int64_t row_blocks, int vectors, bool first, float* y);

  // y (rows, columns), y_stride apart, of sums [16, 16 * vectors]; rounded.
  void (*store)(const float* sums, int vectors, int64_t rows, int64_t columns,
                uint16_t* y, int64_t y_stride);
};

// Kernels for many rows, in bfloat16: activations and values times their scales
// are rounded to it. begin and end stand around what a thread multiplies.
struct TileKernels {
  static constexpr int kRows = 32;  // of a tile, at most
  static constexpr int64_t kBlockWords = kBlockRows * kLanes;

  // A tile [row_blocks, padded, 32] of x (rows, k); rows <= padded, which is
  // even. A row with a NaN or an infinity becomes one with a NaN.
  void (*pack)(const float* x, int64_t rows, int64_t k, int padded,
               uint16_t* tile);

  // Blocks [row_blocks, kBlockWords] of a block of columns, of integers. With
  // meta, a `dense` one has a mask.
  void (*expand)(const Packed& w, bool dense, int64_t column_block,
                 uint16_t* columns);

  void (*begin)(int padded);
  // y (padded, 16 * column_blocks), y_stride apart.
  void (*multiply)(const uint16_t* tile, int padded, const uint16_t* columns,
                   int64_t row_blocks, int64_t column_blocks, float* y,
                   int64_t y_stride);
  void (*end)();
};

// Rows of activations as int8: 32 entries are a block, x = step * q. Each
// instruction set has an order of its own for the bytes: one for all dense
// matrices, whatever their bits. `rows` is one of Int8Kernels::tile_rows.
struct Int8Rows {
  static int64_t size_of_bytes(int64_t row_blocks, int rows) {
    return (row_blocks + row_blocks % 2) * kBlockRows * rows;
  }

  int rows;
  uint8_t* bytes;    // size_of_bytes
  float* steps;      // [row_blocks, rows]; NaN where not all is finite
  int32_t* offsets;  // [row_blocks, rows]: minus the sums of q, if asked for
};

// The kernels for one type of values, sparse or dense.
struct Int8Kernels {
  const int* tile_rows;  // as below; at most kMostTileRows

  // Row `row` of `out`, from x (k,).
  void (*quantize)(const float* x, int64_t k, int row, const Int8Rows& out);

  // As Kernels::multiply.
  void (*multiply)(const Int8Rows& x, const Packed& w, int64_t column_block,
                   float* y, int64_t y_stride);

  // Of dense values with a byte each: the 512 of a block, from those that a
  // mask keeps.
  void (*expand)(const void* values, const uint32_t* mask, char* bytes);

  // As `multiply`, by a matrix with a mask; null where each block had better be
  // expanded before.
  void (*multiply_masked)(const Int8Rows& x, const Packed& w,
                          int64_t column_block, float* y, int64_t y_stride) = nullptr;
};
constexpr int kMostTileRows = 32;

// Blocks of columns for a call: memory gives more when asked for several.
constexpr int64_t kCallBlocks = 4;

// The keys and values of one head of a sequence: `size` floats at each place,
// `stride` apart; size is a multiple of kLanes.
struct HeadOfKeys {
  static int64_t room(int64_t count) {
    return (count + kLanes - 1) / kLanes * kLanes;
  }
  // Floats to work in: a square, factors, the keys across, and scores.
  static int64_t scratch(int64_t places, int64_t size) {
    return kLanes * kLanes + kQueries + (size + kQueries) * room(places);
  }
  static constexpr int kQueries = 48;  // at most, of `attend`

  const float* keys;
  const float* values;
  const uint8_t* mask;  // [places], 0 where nothing is to be seen; or null
  int64_t places;
  int64_t stride;
  int64_t size;
};
// A score that leaves a place without weight, unless all have it.
constexpr float kHidden = 1e38f;

// The most columns that are rounded at a time: they stay in a cache.
constexpr int64_t kColumnsToRound = 64;

// As of kwm_round_in_order, for some columns of n = `stride`.
struct RowsToRound {
  const float* targets;
  const float* coupling;
  const float* kept;
  const float* scales;
  const float* before;
  int64_t rows;
  int64_t columns;
  int64_t stride;
  float low;
  float high;
};

// As of kwm_prune_in_order and kwm_swap_in_order, likewise.
struct GroupsOfRows {
  const float* weights;
  int64_t rows;
  int64_t columns;
  int64_t stride;
  int64_t m;
  int64_t kept;
};
constexpr int64_t kMostGroupedRows = 128;

constexpr int kManyVectors = 4;
constexpr int kDenseVectors = 3;

// A panel holds rows of activations in blocks of 16 columns, [K/16, rows, 16],
// so that a kernel reads it from the first byte to the last.
struct Kernels {
  int isa;

  // y = x @ kCallBlocks blocks of columns, or those left; indexed by
  // the type of the values. x is a panel of `rows` rows, one of the sizes in
  // tile_rows (rising, ends with 0); y has them y_stride apart.
  const int* tile_rows;
  void (*multiply[3])(const float* x, int rows, const Packed& w,
                      int64_t column_block, float* y, int64_t y_stride);

  // Floats in a vector, and out [width, width] = in^T.
  int width;
  void (*transpose)(const float* in, int64_t in_stride, float* out,
                    int64_t out_stride);

  // Many rows at once, lanes are the rows: a tile of kManyVectors vectors.
  // slots [16, row_blocks, 16] and words [16, row_blocks]: a block of columns,
  // column by column.
  void (*slots_of_columns[3])(const void* values, const uint32_t* meta,
                              int64_t row_blocks, float* slots,
                              uint32_t* words);
  // y [16, tile] (+)= these columns^T @ x [32 * row_blocks, tile]
  void (*multiply_many)(const float* x, const float* slots,
                        const uint32_t* words, int64_t row_blocks, bool first,
                        float* y);

  // dense [32, 16] = one block of rows of one block of columns, likewise.
  void (*expand[3])(const void* values, const uint32_t* meta, float* dense);

  // y [8, lanes] (+)= dense [8 rows of 16] @ dy [16, lanes], over all blocks of
  // columns: `dense` moves on by 32 * 16 and dy by 16 * lanes. `lanes` is one
  // vector or kDenseVectors.
  void (*multiply_dense)(const float* dense, const float* dy, int lanes,
                         int64_t column_blocks, bool first, float* y);

  // dvalues [8, 16] (+)= the gradient of 8 slots from 16 columns of the panel
  // x [rows, 16] and of dy [rows, 16]. meta is shifted to the first of them.
  void (*gradient)(const float* x, const float* dy, int64_t rows,
                   const uint32_t* meta, int first_slot, bool first,
                   float* dvalues);

  // out [queries, size] = softmax(scale * q @ keys^T) @ values, for `heads` heads
  // of queries that share these keys: those of a query lie after one another,
  // queries of q and of out are `stride` apart, and each has a row of head.mask,
  // `mask_stride` apart.
  void (*attend)(const float* q, int64_t stride, int queries, int heads,
                 const HeadOfKeys& head, int64_t mask_stride, float scale,
                 float* scratch, float* out);

  void (*round_in_order)(const RowsToRound& of, float* rounded, float* moved);

  // As kwm_search_scales, for some columns of one group.
  void (*search_scales)(const float* matrix, int64_t stride,
                        const float* weights, int64_t rows, int64_t columns,
                        const float* factors, int64_t count, float low,
                        float high, float split, float* scales);

  // As kwm_multiples and kwm_multiples_gradient, for one group.
  void (*multiples)(const float* weights, const float* scales, int64_t rows,
                    int64_t columns, float low, float high, float* values);
  void (*multiples_gradient)(const float* slope, const float* weights,
                             const float* scales, int64_t rows, int64_t columns,
                             float low, float high, float* by_weight,
                             float* by_scale);

  void (*prune_in_order)(const GroupsOfRows& of, const float* factor,
                         float* pruned, float* errors);
  void (*swap_in_order)(const GroupsOfRows& of, const float* dense,
                        const float* moment, const float* inverse, float* slope,
                        float* swapped);
};

// Those of kwm_isa.
const Kernels& kernels_in_use();

// Those of another machine are declared, and not there.
const Kernels* scalar_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
const Kernels* neon_kernels();
const BFloat16Kernels* avx512_bf16_kernels();
const TileKernels* amx_kernels();  // null where there is no AMX

// Those of int8 activations, likewise.
const Int8Kernels* scalar_int8_kernels(int type, bool dense);
const Int8Kernels* avx2_int8_kernels(int type, bool dense);
const Int8Kernels* avx_vnni_int8_kernels(int type, bool dense);
const Int8Kernels* avx512_int8_kernels(int type, bool dense);
const Int8Kernels* neon_int8_kernels(int type, bool dense);
const Int8Kernels* neon_dot_int8_kernels(int type, bool dense);

#if defined(__x86_64__)
// The bit of EAX in leaf 7, subleaf 1 of CPUID for each; plus 32 that of EDX in
// subleaf 0.
enum class Feature {
  kAvxVnni = 4,
  kAvx512BFloat16 = 5,
  kAmxBFloat16 = 32 + 22,
  kAmxTile = 32 + 24,
};
bool has(Feature feature);

// Whether what is read once may come fastest past the second-level cache.
extern const bool kReadsPastCache;
#endif

}  // namespace kwm

#endif  // KWM_KERNELS_H_
