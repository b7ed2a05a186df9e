// Products of matrices whose left one lies in panels of MR rows, and rows of four as columns.

#pragma once

#include "vectors.h"

namespace {

// Rows of results held in registers, and vectors of each.
#if defined(__AVX__) && !defined(__AVX512F__)
constexpr int MR = 4;
#else
constexpr int MR = 8;
#endif
constexpr int NR = 3;
constexpr int64_t PAIR = 2 * LANES;

// All rows of a few columns. Panels of MR rows of A lie one behind another, ``ap`` apart.
template <int N, bool MORE>
inline void column(int64_t rows, int64_t depth, const float* a, int64_t ak, int64_t am, int64_t ap, const float* b,
                   int64_t bk, float* c, int64_t cm) {
    for (int64_t m = 0; m < rows; m += MR, a += ap) tile<MR, N, MORE>(depth, a, ak, am, b, bk, c + m * cm, cm);
}

// So many vectors of columns.
template <bool MORE>
inline void columns(int64_t vectors, int64_t rows, int64_t depth, const float* a, int64_t ak, int64_t am, int64_t ap,
                    const float* b, int64_t bk, float* c, int64_t cm) {
    for (; vectors >= NR; vectors -= NR, b += NR * LANES, c += NR * LANES)
        column<NR, MORE>(rows, depth, a, ak, am, ap, b, bk, c, cm);
    if (vectors == 2) column<2, MORE>(rows, depth, a, ak, am, ap, b, bk, c, cm);
    if (vectors == 1) column<1, MORE>(rows, depth, a, ak, am, ap, b, bk, c, cm);
}

// Rows of 4 x 4 numbers as columns.
inline void turn(const float* from, int64_t ld, float* to, int64_t td) {
    using F = Vec<4>;
    const F a = load<F>(from), b = load<F>(from + ld), c = load<F>(from + 2 * ld), d = load<F>(from + 3 * ld);
    const F p = __builtin_shufflevector(a, b, 0, 4, 1, 5), q = __builtin_shufflevector(a, b, 2, 6, 3, 7);
    const F r = __builtin_shufflevector(c, d, 0, 4, 1, 5), s = __builtin_shufflevector(c, d, 2, 6, 3, 7);
    store<F>(to, __builtin_shufflevector(p, r, 0, 1, 4, 5));
    store<F>(to + td, __builtin_shufflevector(p, r, 2, 3, 6, 7));
    store<F>(to + 2 * td, __builtin_shufflevector(q, s, 0, 1, 4, 5));
    store<F>(to + 3 * td, __builtin_shufflevector(q, s, 2, 3, 6, 7));
}

}  // namespace
