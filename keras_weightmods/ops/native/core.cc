// The public functions: choice of the instruction set, split of the work.

#include "layout.h"

namespace {

using kwm::kBlockRows;
using kwm::kBlockSlots;
using kwm::kLanes;
using kwm::Packed;

void run(kwm_parallel_for parallel_for, void* pool, int64_t count,
         int64_t grain, kwm_task task, void* context) {
  if (count <= 0) return;
  if (parallel_for == nullptr) {
    task(context, 0, count);
  } else {
    parallel_for(pool, count, grain, task, context);
  }
}

struct Product {
  const float* in;
  float* out;
  int64_t rows;
  Packed w;
};

void matmul_column_blocks(void* context, int64_t begin, int64_t end) {
  const auto& c = *static_cast<const Product*>(context);
  const Packed& w = c.w;
  for (int64_t nb = begin; nb < end; ++nb) {
    const int lanes = static_cast<int>(kwm::min(kLanes, w.n - nb * kLanes));
    for (int64_t r = 0; r < c.rows; ++r) {
      const float* x = c.in + r * w.k;
      float sum[kLanes] = {};
      for (int64_t kb = 0; kb < w.row_blocks(); ++kb) {
        const int64_t place = nb * w.row_blocks() + kb;
        for (int slot = 0; slot < kBlockSlots; ++slot) {
          for (int j = 0; j < lanes; ++j) {
            const int64_t row =
                kb * kBlockRows + kwm::slot_row(w.meta[place * kLanes + j], slot);
            if (row >= w.k) continue;
            sum[j] += x[row] * kwm::stored_value(
                                   w.values, w.type,
                                   kwm::value_offset(w.type, place, slot, j));
          }
        }
      }
      for (int j = 0; j < lanes; ++j) {
        const int64_t column = nb * kLanes + j;
        c.out[r * w.n + column] =
            w.type == KWM_INT8 ? sum[j] * w.scale[column] : sum[j];
      }
    }
  }
}

void transposed_rows(void* context, int64_t begin, int64_t end) {
  const auto& c = *static_cast<const Product*>(context);
  const Packed& w = c.w;
  for (int64_t r = begin; r < end; ++r) {
    const float* dy = c.in + r * w.n;
    float* dx = c.out + r * w.k;
    for (int64_t i = 0; i < w.k; ++i) dx[i] = 0;
    for (int64_t column = 0; column < w.n; ++column) {
      const int lane = static_cast<int>(column % kLanes);
      const float dy_step =
          w.type == KWM_INT8 ? dy[column] * w.scale[column] : dy[column];
      for (int64_t kb = 0; kb < w.row_blocks(); ++kb) {
        const int64_t place = column / kLanes * w.row_blocks() + kb;
        for (int slot = 0; slot < kBlockSlots; ++slot) {
          const int64_t row =
              kb * kBlockRows + kwm::slot_row(w.meta[place * kLanes + lane], slot);
          if (row >= w.k) continue;
          dx[row] += dy_step * kwm::stored_value(
                                   w.values, w.type,
                                   kwm::value_offset(w.type, place, slot, lane));
        }
      }
    }
  }
}

struct Gradient {
  const float* x;
  const float* dy;
  float* dvalues;
  int64_t rows;
  Packed w;
};

void gradient_column_blocks(void* context, int64_t begin, int64_t end) {
  const auto& c = *static_cast<const Gradient*>(context);
  const Packed& w = c.w;
  for (int64_t nb = begin; nb < end; ++nb) {
    for (int64_t kb = 0; kb < w.row_blocks(); ++kb) {
      const int64_t place = nb * w.row_blocks() + kb;
      for (int slot = 0; slot < kBlockSlots; ++slot) {
        for (int j = 0; j < kLanes; ++j) {
          const int64_t column = nb * kLanes + j;
          const int64_t row =
              kb * kBlockRows + kwm::slot_row(w.meta[place * kLanes + j], slot);
          float sum = 0;
          if (column < w.n && row < w.k) {
            for (int64_t r = 0; r < c.rows; ++r) {
              sum += c.x[r * w.k + row] * c.dy[r * w.n + column];
            }
          }
          c.dvalues[kwm::value_offset(KWM_FLOAT32, place, slot, j)] = sum;
        }
      }
    }
  }
}

}  // namespace

int kwm_abi_version(void) { return KWM_ABI_VERSION; }

int kwm_isa(void) { return KWM_ISA_SCALAR; }

int kwm_set_isa(int isa) { return isa == KWM_ISA_SCALAR ? isa : -1; }

void kwm_matmul(const float* x, int64_t rows, int64_t k, int64_t n, int type,
                const void* values, const uint32_t* meta, const float* scale,
                float* y, kwm_parallel_for parallel_for, void* pool) {
  Product product{x, y, rows, {k, n, type, values, meta, scale}};
  run(parallel_for, pool, product.w.column_blocks(), 1, matmul_column_blocks,
      &product);
}

void kwm_matmul_transposed(const float* dy, int64_t rows, int64_t k, int64_t n,
                           int type, const void* values, const uint32_t* meta,
                           const float* scale, float* dx,
                           kwm_parallel_for parallel_for, void* pool) {
  Product product{dy, dx, rows, {k, n, type, values, meta, scale}};
  run(parallel_for, pool, rows, 1, transposed_rows, &product);
}

void kwm_values_gradient(const float* x, const float* dy, int64_t rows,
                         int64_t k, int64_t n, const uint32_t* meta,
                         float* dvalues, kwm_parallel_for parallel_for,
                         void* pool) {
  Gradient gradient{
      x, dy, dvalues, rows, {k, n, KWM_FLOAT32, nullptr, meta, nullptr}};
  run(parallel_for, pool, gradient.w.column_blocks(), 1, gradient_column_blocks,
      &gradient);
}

int kwm_is_faster_than_dense(int64_t, int64_t, int64_t, int) { return 1; }
