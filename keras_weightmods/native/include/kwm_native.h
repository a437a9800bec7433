// Products with packed weights, attention and rounding on the CPU: a plain C
// interface, no Python, no framework.
//
// A kernel W of shape (k, n) is packed in groups of 4 along k, the contraction
// axis; of each group and column at most 2 values are nonzero, and 2 are kept.
// With NB = ceil(n / 16) blocks of 16 columns and KP = k rounded up to 32, a
// block of 32 rows has 8 groups and so 16 slots in a column: slot 2g + t is
// kept value t (0 or 1) of group g.
//
//   meta      uint32   [NB, KP/32, 16]        one word a column: bits 2s, 2s+1
//                                             are the row in the group that
//                                             slot s was taken from
//   values    float32  [NB, KP/2, 16]
//             bfloat16 [NB, KP/4, 16, 2]      the pair of a group side by side
//             int8     [NB, KP/32, 4, 16, 4]  byte q of word p is slot p + 4q
//             int4     [NB, KP/32, 2, 16, 4]  byte q of word p: the low four
//                                             bits are slot p + 4q, the high
//                                             ones slot p + 2 + 4q; two's
//                                             complement, -8 to 7
//   scale     float32  [NB, 16]               int8: value = byte * scale
//             bfloat16 [NB, ceil(KP/64), 16]  fewer bits, one for 64 rows of a
//                                             column
//
// Rows and columns beyond k and n hold zero values and scale 1. The indices of
// a group are strictly rising as Python packs them. Any bits are safe to read:
// an index cannot leave its group, and where it names a row beyond k the value
// is multiplied by zero or skipped. Two equal indices add.
//
// A matrix that is not sparse may be of integers too, for kwm_matmul_int8
// alone: of b bits, 2 to 6 or 8, in two's complement. It has no meta, the same
// scale, and all of its values. Those of 32 rows and a column are 8 words of 4;
// byte q of a line has bits of the rows 4g + q, for the words g = 0 to 7:
//
//   values    int8     [NB, KP/32, b, 16, 4]  b lines
//
// A line holds 8 / b words whole: line p has word p + b i from bit b i on. What
// is left of the bytes of all lines, after one another, holds the other words.
// So the 3 bits of word 6 are bits 6 and 7 of line 0, and bit 6 of line 1.
//
// A matrix with at most 16 nonzeros in each 32 rows of a column, whatever their
// places, is held as one of int8 or int4 for kwm_matmul_int8 too:
//
//   meta      uint32   [NB, KP/32, 8, 2]      a bit for each byte of the dense
//                                             int8 values of a block, in their
//                                             order: bit 4 j + q of the 64 of
//                                             word g is row 4g + q of column j
//   values                                    of the size above. The i-th bit
//                                             that is set has value i, which is
//                                             byte i of int8; of int4 the low
//                                             (i < 128) or high half of byte
//                                             i % 128
//
// Values beyond the bits are not read, and bits beyond the 256 values are zero.
//
// Arrays need no alignment beyond that of their elements. Nothing here keeps
// state between calls but the choice of kwm_set_isa.

#ifndef KWM_NATIVE_H_
#define KWM_NATIVE_H_

#include <stdint.h>

#if defined(_WIN32)
#define KWM_API __declspec(dllexport)
#else
#define KWM_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define KWM_ABI_VERSION 11

enum {
  KWM_FLOAT32 = 0,
  KWM_BFLOAT16 = 1,
  KWM_INT8 = 2,
  KWM_INT4 = 3,
  KWM_INT2 = 4,  // it and those below: dense matrices alone
  KWM_INT3 = 5,
  KWM_INT5 = 6,
  KWM_INT6 = 7,
  KWM_MASKED = 16  // added to KWM_INT8 or KWM_INT4: meta is a mask
};

enum {
  KWM_ISA_SCALAR = 0,
  KWM_ISA_AVX2 = 1,
  KWM_ISA_AVX512 = 2,
  KWM_ISA_NEON = 3,
  KWM_ISA_AVX_VNNI = 4,  // AVX2, and products of int8 in one instruction
  KWM_ISA_AMX = 5        // AVX-512, and tiles of bfloat16 for many rows
};

// Work on the items begin <= i < end.
typedef void (*kwm_task)(void* context, int64_t begin, int64_t end);

// Calls task on ranges that cover 0 <= i < count exactly once, from any thread
// and in any order, and returns when all are done. A range should hold `grain`
// items or more, where that many are left.
typedef void (*kwm_parallel_for)(void* pool, int64_t count, int64_t grain,
                                 kwm_task task, void* context);

KWM_API int kwm_abi_version(void);

// The instruction set in use: the best that this CPU has, unless set.
KWM_API int kwm_isa(void);

// Returns the one set, or -1 and changes nothing if this CPU lacks it.
KWM_API int kwm_set_isa(int isa);

// y (rows, n) = x (rows, k) @ W, both row-major. rows, k and n may be zero.
// scale may be NULL unless type is of integers. Without a parallel_for
// (NULL) the caller's thread does all the work.
//
// The sums are of float32. int4 values are made float32 in each call, which is
// slow.
KWM_API void kwm_matmul(const float* x, int64_t rows, int64_t k, int64_t n,
                        int type, const void* values, const uint32_t* meta,
                        const void* scale, float* y,
                        kwm_parallel_for parallel_for, void* pool);

// As kwm_matmul, for x, values and y of bfloat16. The sums are of float32, and
// each is rounded to nearest even once, to y.
//
// Of 28 rows and more they may be made of two products at a time (AVX512-BF16):
// each is exact, but added in an order of its own, and what is below 2^-126,
// the least normal number, counts as zero, among x, the values and the sums.
// That adds an error of at most 2^-126 * sum (1 + |x| + |W[:, column]|) to an
// output.
KWM_API void kwm_matmul_bfloat16(const uint16_t* x, int64_t rows, int64_t k,
                                 int64_t n, const void* values,
                                 const uint32_t* meta, uint16_t* y,
                                 kwm_parallel_for parallel_for, void* pool);

// y (rows, n) = x (rows, k) @ W with int8 activations: of every 32 entries of a
// row, s = max |x| / 127 (1 where that is 0) and q = x / s rounded to nearest
// even. type is one of integers, with KWM_MASKED where meta is a mask; meta is
// NULL where W is dense. The sum
// over 32 rows of W is one of integers and exact; those are scaled and added in
// float32. So |y - x @ W| <= sum over the entries of s / 2 * |W[:, column]|,
// but for the rounding of that sum. A row with a NaN or an infinity is NaN.
//
// With KWM_ISA_AMX and 32 rows or more, x and the products of values and scales
// are rounded to bfloat16 instead, to nearest even, and added in float32. That is
// finer, but for large entries, so that the bound is twice the one above. What is
// below 2^-126 counts as zero, as in kwm_matmul_bfloat16.
KWM_API void kwm_matmul_int8(const float* x, int64_t rows, int64_t k, int64_t n,
                             int type, const void* values, const uint32_t* meta,
                             const void* scale, float* y,
                             kwm_parallel_for parallel_for, void* pool);

// A matrix (k, n) of a type as above, and where its product goes.
typedef struct {
  int64_t n;
  int64_t type;
  const void* values;
  const uint32_t* meta;
  const void* scale;
  float* y;
} kwm_product;

// kwm_matmul_int8 of one x by `count` matrices, which rounds x once and shares
// the threads' work once. Dense matrices and those with a mask may be of several
// types; 2:4 ones are all of one, and none is of another pattern.
KWM_API void kwm_matmul_int8_many(const float* x, int64_t rows, int64_t k,
                                  const kwm_product* products, int64_t count,
                                  kwm_parallel_for parallel_for, void* pool);

// dx (rows, k) = dy (rows, n) @ W^T
KWM_API void kwm_matmul_transposed(const float* dy, int64_t rows, int64_t k,
                                   int64_t n, int type, const void* values,
                                   const uint32_t* meta, const void* scale,
                                   float* dx, kwm_parallel_for parallel_for,
                                   void* pool);

// dvalues, float32 in the layout of float32 values: the gradient of the kept
// values, sum over rows of x[row, k] * dy[row, n]; zero in the padding.
KWM_API void kwm_values_gradient(const float* x, const float* dy, int64_t rows,
                                 int64_t k, int64_t n, const uint32_t* meta,
                                 float* dvalues, kwm_parallel_for parallel_for,
                                 void* pool);

// out (batch, queries, heads, size): the attention of q to the places of keys and
// values (batch, places, key_heads, size): softmax(scale * q @ keys^T) @ values.
// heads / key_heads heads of queries after one another share a head of keys. The
// sequences of keys, and those of values, are `stride` floats apart. mask
// (batch, queries, places) is 0 where a place is not seen by a query; NULL shows
// all. A query to which it shows none gets the mean of all values, each with the
// same weight. size is a multiple of 16. Without places out is zero.
KWM_API void kwm_attend(const float* q, const float* keys, const float* values,
                        int64_t stride, const uint8_t* mask, int64_t batch,
                        int64_t queries, int64_t places, int64_t heads,
                        int64_t key_heads, int64_t size, float scale,
                        float* out, kwm_parallel_for parallel_for, void* pool);

// Rounds rows one after the other, for the changes of those above. Row i of
// rounded (rows, n) has the multiples of scales[i], low to high times it, nearest
// to kept[i] * (targets[i] - coupling[i, :i] @ moved[:i]). moved is what they
// differ by from before or, where that is NULL, from what was rounded. kept is 0
// or 1. coupling is (rows, rows), and all others are as rounded.
KWM_API void kwm_round_in_order(const float* targets, const float* coupling,
                                const float* kept, const float* scales,
                                const float* before, int64_t rows, int64_t n,
                                float low, float high, float* rounded,
                                float* moved);

// scales (ceil(k / rows), n) for groups of `rows` rows of matrix (k, n): of the
// `count` products of a factor and the largest |w| with its sign, the first for
// which the multiples nearest to w, low to high times it, have the least sum of
// weights (k) times squared errors. A scale has as many bits as split, a power
// of two, leaves to 24. It is 1 where all |w| < 1e-30.
KWM_API void kwm_search_scales(const float* matrix, const float* weights,
                               int64_t k, int64_t rows, int64_t n,
                               const float* factors, int64_t count, float low,
                               float high, float split, float* scales);

// values (groups, rows, n) = the multiples of scales (groups, n), low to high
// times them, nearest to weights.
KWM_API void kwm_multiples(const float* weights, const float* scales,
                           int64_t groups, int64_t rows, int64_t n, float low,
                           float high, float* values,
                           kwm_parallel_for parallel_for, void* pool);

// Its gradients, for the slope of values, as if weights and ratios were not
// rounded. by_weight is the slope, and 0 where a weight is beyond the limits.
// by_scale (groups, n) is the sum over rows of slope * (integer - ratio), and of
// slope * integer there.
KWM_API void kwm_multiples_gradient(const float* slope, const float* weights,
                                    const float* scales, int64_t groups,
                                    int64_t rows, int64_t n, float low,
                                    float high, float* by_weight,
                                    float* by_scale,
                                    kwm_parallel_for parallel_for, void* pool);

// Prunes rows to `kept` of m, group after group, and lets later rows make up for
// it (SparseGPT, arXiv 2301.00774). rows, at most 128, is a multiple of m. factor
// (rows, rows) is upper triangular. Of each group and column the weights (rows,
// n) with the largest |w_i / factor_ii| stay, the earlier of equal ones. errors
// are the removed ones over factor_ii. Row i of the factor times the error of row
// i leaves the rows below.
KWM_API void kwm_prune_in_order(const float* weights, const float* factor,
                                int64_t rows, int64_t n, int64_t m,
                                int64_t kept, float* pruned, float* errors);

// Makes the best swap of each column in each group of m rows, one after the other.
// weights (rows, n) have at most `kept` nonzero of m, and dense are those before
// pruning. moment is (rows, rows). inverse (rows) is one over its diagonal, or 0
// where a row cannot improve a column. slope (rows, n) = moment @ (dense -
// weights) over all inputs, and is updated.
KWM_API void kwm_swap_in_order(const float* weights, const float* dense,
                               const float* moment, const float* inverse,
                               int64_t rows, int64_t n, int64_t m, int64_t kept,
                               float* slope, float* swapped);

// A kwm_parallel_for on the OpenMP threads that the process has already.
// The pool: the address of GOMP_parallel, and the threads to use.
typedef struct {
  void (*parallel)(void (*function)(void*), void* data, unsigned threads,
                   unsigned flags);
  int64_t threads;
} kwm_openmp;

KWM_API void kwm_openmp_for(void* pool, int64_t count, int64_t grain,
                            kwm_task task, void* context);

#ifdef __cplusplus
}
#endif

#endif  // KWM_NATIVE_H_
