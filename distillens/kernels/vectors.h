// Vectors of numbers, products of small matrices that stay in the cache, and how work is shared among threads.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#define INLINE inline __attribute__((always_inline))
#define INLINED __attribute__((always_inline))

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int64_t SLICES = 8;  // of a sum over blocks, or groups, so that as many threads can share the work

template <int N> struct Of { typedef float type __attribute__((vector_size(N * 4))); };
template <int N> using Vec = typename Of<N>::type;
using Lanes = Vec<LANES>;

template <class V> inline V load(const float* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
template <class V> inline void store(float* p, const V& v) { std::memcpy(p, &v, sizeof v); }

using Eight = Vec<8>;

#define MIXED(p, q, ...) __builtin_shufflevector(p, q, __VA_ARGS__)
// Four rows of four as columns, in both halves.
INLINE void transpose_halves(const Eight* r, Eight* to) {
    const Eight a = MIXED(r[0], r[1], 0, 8, 1, 9, 4, 12, 5, 13), b = MIXED(r[0], r[1], 2, 10, 3, 11, 6, 14, 7, 15);
    const Eight c = MIXED(r[2], r[3], 0, 8, 1, 9, 4, 12, 5, 13), d = MIXED(r[2], r[3], 2, 10, 3, 11, 6, 14, 7, 15);
    to[0] = MIXED(a, c, 0, 1, 8, 9, 4, 5, 12, 13);
    to[1] = MIXED(a, c, 2, 3, 10, 11, 6, 7, 14, 15);
    to[2] = MIXED(b, d, 0, 1, 8, 9, 4, 5, 12, 13);
    to[3] = MIXED(b, d, 2, 3, 10, 11, 6, 7, 14, 15);
}
INLINE Eight low_halves(const Eight& p, const Eight& q) { return MIXED(p, q, 0, 1, 2, 3, 8, 9, 10, 11); }
INLINE Eight high_halves(const Eight& p, const Eight& q) { return MIXED(p, q, 4, 5, 6, 7, 12, 13, 14, 15); }
#undef MIXED

// Eight rows of eight as columns.
INLINE void transpose(const Eight* r, Eight* to) {
    Eight s[8];
    transpose_halves(r, s);
    transpose_halves(r + 4, s + 4);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        to[i] = low_halves(s[i], s[4 + i]);
        to[4 + i] = high_halves(s[i], s[4 + i]);
    }
}

// Planes of eight channels, ``size`` numbers each, pixel by pixel, and back.
INLINE void read_planes(const float* planes, int64_t size, Eight* to) {
    for (int64_t p = 0; p < size; p += 8) {
        Eight rows[8];
#pragma GCC unroll 8
        for (int c = 0; c < 8; ++c) rows[c] = load<Eight>(planes + c * size + p);
        transpose(rows, to + p);
    }
}
INLINE void write_planes(const Eight* from, int64_t size, float* planes) {
    for (int64_t p = 0; p < size; p += 8) {
        Eight rows[8];
        transpose(from + p, rows);
#pragma GCC unroll 8
        for (int c = 0; c < 8; ++c) store<Eight>(planes + c * size + p, rows[c]);
    }
}

INLINE Eight added(const Eight* v) { return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7])); }

INLINE Eight one_over_root(const Eight& v) {
    float found[8];
    store<Eight>(found, v);
    for (int l = 0; l < 8; ++l) found[l] = 1.f / std::sqrt(found[l]);
    return load<Eight>(found);
}

// C[m][n] = (or +=) sum over k of A[k][m] B[k][n]
template <int M, int N, bool MORE>
inline void tile(int64_t depth, const float* a, int64_t ak, int64_t am, const float* b, int64_t bk, float* c,
                 int64_t cm) {
    Lanes sum[M][N];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) sum[m][n] = MORE ? load<Lanes>(c + m * cm + n * LANES) : Lanes{};
#pragma GCC unroll 4
    for (int64_t k = 0; k < depth; ++k) {
        Lanes right[N];
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) right[n] = load<Lanes>(b + k * bk + n * LANES);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
            const float left = a[k * ak + m * am];
#pragma GCC unroll 16
            for (int n = 0; n < N; ++n) sum[m][n] += left * right[n];
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) store(c + m * cm + n * LANES, sum[m][n]);
}

// Memory of a thread, kept from call to call.
inline float* scratch(size_t which, size_t numbers) {
    thread_local std::vector<float> room[5];
    if (room[which].size() < numbers + 16) room[which].resize(numbers + 16);
    return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(room[which].data()) + 63) / 64 * 64);
}

// Blocks of groups: ``prepared(group, u)`` writes what the blocks of a group share, of some size, before ``one(group, block, u)``.
template <class P, class O>
void by_block(int64_t groups, int64_t blocks, int64_t size, const P& prepared, const O& one) {
    if (groups >= SLICES) {  // what a group's blocks share stays where it is used
#pragma omp parallel for
        for (int64_t g = 0; g < groups; ++g) {
            float* u = scratch(3, size);
            prepared(g, u);
            for (int64_t b = 0; b < blocks; ++b) one(g, b, u);
        }
        return;
    }
    float* u = scratch(3, groups * size);
#pragma omp parallel for if (groups > 1)
    for (int64_t g = 0; g < groups; ++g) prepared(g, u + g * size);
#pragma omp parallel for collapse(2) if (groups * blocks > 1)
    for (int64_t g = 0; g < groups; ++g)
        for (int64_t b = 0; b < blocks; ++b) one(g, b, u + g * size);
}

// Sums over the blocks of each group: ``one(group, first block, the one after the last, sum)`` writes those of a slice,
// ``finished(group, sum)`` is given those of all. Slices are added in their order, whoever took them.
template <class O, class F>
void by_slice(int64_t groups, int64_t blocks, int64_t slices, int64_t size, const O& one, const F& finished) {
    auto slice = [&](int64_t g, int64_t s, float* sum) { one(g, blocks * s / slices, blocks * (s + 1) / slices, sum); };
    auto added = [&](int64_t g, float* sums) {
        for (int64_t s = 1; s < slices; ++s)
            for (int64_t i = 0; i < size; ++i) sums[i] += sums[s * size + i];
        finished(g, sums);
    };
    if (groups >= SLICES) {  // a group's sums stay where they are used
#pragma omp parallel for
        for (int64_t g = 0; g < groups; ++g) {
            float* sums = scratch(4, slices * size);
            for (int64_t s = 0; s < slices; ++s) slice(g, s, sums + s * size);
            added(g, sums);
        }
        return;
    }
    float* sums = scratch(3, groups * slices * size);
#pragma omp parallel for collapse(2) if (groups * slices > 1)
    for (int64_t g = 0; g < groups; ++g)
        for (int64_t s = 0; s < slices; ++s) slice(g, s, sums + (g * slices + s) * size);
    for (int64_t g = 0; g < groups; ++g) added(g, sums + g * slices * size);
}

}  // namespace
