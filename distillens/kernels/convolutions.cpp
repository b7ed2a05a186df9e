// 3 x 3 convolutions. Of few channels (the colours of an image): one product of the filters with the nine shifted planes of
// each. Of many, padded by one, in planes of even height that are 4 (and 4 high), 8, 16 or 32 wide: Winograd's minimal
// filtering F(2 x 2, 3 x 3), 16 products for every 2 x 2 results and channel, where the sum over the filter takes 36:
//
//   y = A' [ (G g G') * (B' d B) ] A      d: 4 x 4 of the image (a tile), g: a filter, y: 2 x 2 of the result
//
// The 16 places of a tile (xi) are 16 matrix products over channels. The gradient in a filter is the transpose of the same
// lines: G' [ (A dy A') * (B' d B) ] G, summed over tiles. Work is cut into blocks by what is convolved alone, and sums over
// blocks are taken in slices of their own: neither the number of threads nor the other groups change a bit.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "planes.cpp"
#undef SIZES

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, MR = 8;
#elif defined(__AVX__)
constexpr int LANES = 8, MR = 4;
#else
constexpr int LANES = 4, MR = 8;
#endif
constexpr int NR = 3;  // vectors of a row of results held in registers, with MR rows
constexpr int64_t PAIR = 2 * LANES;
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

// All rows of a few columns. Panels of MR rows of A lie one behind another, ``ap`` apart.
template <int N, bool MORE>
inline void column(int64_t rows, int64_t depth, const float* a, int64_t ak, int64_t am, int64_t ap, const float* b,
                   int64_t bk, float* c, int64_t cm) {
    for (int64_t m = 0; m < rows; m += MR, a += ap) tile<MR, N, MORE>(depth, a, ak, am, b, bk, c + m * cm, cm);
}

#define SHUFFLE(NAME, ...)                                                                     \
    template <int N, int... I>                                                                 \
    inline Vec<N> NAME(const Vec<N>& p, const Vec<N>& q, std::integer_sequence<int, I...>) {   \
        return __builtin_shufflevector(p, q, (__VA_ARGS__)...);                                \
    }
SHUFFLE(evens, 2 * I)
SHUFFLE(odds, 2 * I + 1)
SHUFFLE(after, I + 1)
SHUFFLE(before, I ? I - 1 : N)
SHUFFLE(low, I / 2 + (I % 2) * N)
SHUFFLE(high, N / 2 + I / 2 + (I % 2) * N)
template <int N> using Each = std::make_integer_sequence<int, N>;

// Within each half of two vectors of eight: what no processor needs more than one instruction for.
using Eight = Vec<8>;
#define HALVES(NAME, ...) \
    inline Eight NAME(const Eight& p, const Eight& q) { return __builtin_shufflevector(p, q, __VA_ARGS__); }
HALVES(first_halves, 0, 1, 2, 3, 8, 9, 10, 11)
HALVES(second_halves, 4, 5, 6, 7, 12, 13, 14, 15)
HALVES(evens_in_halves, 0, 2, 8, 10, 4, 6, 12, 14)
HALVES(odds_in_halves, 1, 3, 9, 11, 5, 7, 13, 15)
HALVES(low_in_halves, 0, 8, 1, 9, 4, 12, 5, 13)
HALVES(high_in_halves, 2, 10, 3, 11, 6, 14, 7, 15)
HALVES(second_of_pairs, 8, 0, 8, 2, 8, 4, 8, 6)
HALVES(first_of_pairs, 1, 8, 3, 8, 5, 8, 7, 8)

// So many vectors of columns.
template <bool MORE>
inline void columns(int64_t vectors, int64_t rows, int64_t depth, const float* a, int64_t ak, int64_t am, int64_t ap,
                    const float* b, int64_t bk, float* c, int64_t cm) {
    for (; vectors >= NR; vectors -= NR, b += NR * LANES, c += NR * LANES)
        column<NR, MORE>(rows, depth, a, ak, am, ap, b, bk, c, cm);
    if (vectors == 2) column<2, MORE>(rows, depth, a, ak, am, ap, b, bk, c, cm);
    if (vectors == 1) column<1, MORE>(rows, depth, a, ak, am, ap, b, bk, c, cm);
}

// A unit is a row of N tiles (planes 2N wide), or, for planes of 4 x 4, the eight tiles of those of two images: in halves of a
// vector, the upper tiles of one and the other, then the lower. ``place`` is the row of tiles, or how far the second plane is
// from the first, 0 where there is none.
template <int N, bool SQUARE> struct Unit {
    using V = Vec<N>;
    static constexpr int64_t WIDTH = SQUARE ? 4 : 2 * N;

    static inline void across(const V& left, const V& even, const V& odd, const V& right, float* to, int64_t step) {
        store<V>(to, left - odd);
        store<V>(to + step, even + odd);
        store<V>(to + 2 * step, odd - even);
        store<V>(to + 3 * step, even - right);
    }

    // x: the plane; to[xi * step]
    static inline void split(const float* x, int64_t height, int64_t place, float* to, int64_t step) {
        if constexpr (SQUARE) {
            Eight t[2][4];
#pragma GCC unroll 2
            for (int e = 0; e < 2; ++e, x += place) {
                const Eight upper = load<Eight>(x), lower = load<Eight>(x + 8), none{};
                const Eight p = first_halves(upper, lower), q = second_halves(upper, lower);  // rows 0 2, rows 1 3
                t[e][0] = first_halves(none, q) - q;
                t[e][1] = p + q;
                t[e][2] = q - p;
                t[e][3] = p - second_halves(p, none);
            }
#pragma GCC unroll 4
            for (int k = 0; k < 4; ++k) {
                const Eight even = evens_in_halves(t[0][k], t[1][k]), odd = odds_in_halves(t[0][k], t[1][k]);
                across(second_of_pairs(odd, Eight{}), even, odd, first_of_pairs(even, Eight{}), to + 4 * k * step, step);
            }
        } else {
            V even[4], odd[4];
#pragma GCC unroll 4
            for (int k = 0; k < 4; ++k) {
                const int64_t row = 2 * place + k - 1;
                if (row < 0 || row >= height) { even[k] = odd[k] = V{}; continue; }
                const V p = load<V>(x + row * WIDTH), q = load<V>(x + row * WIDTH + N);
                even[k] = evens<N>(p, q, Each<N>{});
                odd[k] = odds<N>(p, q, Each<N>{});
            }
            auto one = [&](const V& e, const V& o, int k) {
                across(before<N>(o, V{}, Each<N>{}), e, o, after<N>(e, V{}, Each<N>{}), to + 4 * k * step, step);
            };
            one(even[0] - even[2], odd[0] - odd[2], 0);
            one(even[1] + even[2], odd[1] + odd[2], 1);
            one(even[2] - even[1], odd[2] - odd[1], 2);
            one(even[1] - even[3], odd[1] - odd[3], 3);
        }
    }

    // The transpose of ``join``: 2 x 2 numbers of each tile to 16.
    static inline void spread(const float* y, int64_t place, float* to, int64_t step) {
        V e0, o0, e1, o1;
        if constexpr (SQUARE) {
            const Eight none{}, au = load<Eight>(y), al = load<Eight>(y + 8);
            const Eight bu = place ? load<Eight>(y + place) : none, bl = place ? load<Eight>(y + place + 8) : none;
            const Eight p = first_halves(au, al), q = second_halves(au, al), r = first_halves(bu, bl), s = second_halves(bu, bl);
            e0 = evens_in_halves(p, r); o0 = odds_in_halves(p, r);
            e1 = evens_in_halves(q, s); o1 = odds_in_halves(q, s);
        } else {
            const float* row = y + 2 * place * WIDTH;
            V p = load<V>(row), q = load<V>(row + N);
            e0 = evens<N>(p, q, Each<N>{}); o0 = odds<N>(p, q, Each<N>{});
            p = load<V>(row + WIDTH); q = load<V>(row + WIDTH + N);
            e1 = evens<N>(p, q, Each<N>{}); o1 = odds<N>(p, q, Each<N>{});
        }
        auto one = [&](const V& e, const V& o, int k) {
            float* at = to + 4 * k * step;
            store<V>(at, e); store<V>(at + step, e + o); store<V>(at + 2 * step, e - o); store<V>(at + 3 * step, -o);
        };
        one(e0, o0, 0);
        one(e0 + e1, o0 + o1, 1);
        one(e0 - e1, o0 - o1, 2);
        one(-e1, -o1, 3);
    }

    static inline void join(const float* m, int64_t step, float bias, float* y, int64_t place) {
        V s[2][4];
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) {
            const V a = load<V>(m + k * step), b = load<V>(m + (4 + k) * step), c = load<V>(m + (8 + k) * step), d = load<V>(m + (12 + k) * step);
            s[0][k] = a + b + c;
            s[1][k] = b - c - d;
        }
        V y00 = s[0][0] + s[0][1] + s[0][2] + bias, y01 = s[0][1] - s[0][2] - s[0][3] + bias;
        V y10 = s[1][0] + s[1][1] + s[1][2] + bias, y11 = s[1][1] - s[1][2] - s[1][3] + bias;
        if constexpr (SQUARE) {
            const Eight a0 = low_in_halves(y00, y01), a1 = low_in_halves(y10, y11);  // of the first plane rows 0 2, rows 1 3
            const Eight b0 = high_in_halves(y00, y01), b1 = high_in_halves(y10, y11);
            store<Eight>(y, first_halves(a0, a1));
            store<Eight>(y + 8, second_halves(a0, a1));
            if (place) store<Eight>(y + place, first_halves(b0, b1));
            if (place) store<Eight>(y + place + 8, second_halves(b0, b1));
        } else {
            float* row = y + 2 * place * WIDTH;
            store<V>(row, low<N>(y00, y01, Each<N>{}));
            store<V>(row + N, high<N>(y00, y01, Each<N>{}));
            store<V>(row + WIDTH, low<N>(y10, y11, Each<N>{}));
            store<V>(row + WIDTH + N, high<N>(y10, y11, Each<N>{}));
        }
    }
};

// Memory of a thread, kept from call to call.
inline float* scratch(size_t which, size_t numbers) {
    thread_local std::vector<float> room[5];
    if (room[which].size() < numbers + 16) room[which].resize(numbers + 16);
    return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(room[which].data()) + 63) / 64 * 64);
}

// G g G' of filters, in panels of MR: u[xi][o / MR][c][o % MR] from w[o][c][9], or, ``turned``, from w[c][o][9] with each
// filter rotated by half a turn.
void filters(const float* w, float* u, int64_t outputs, int64_t inputs, bool turned) {
    using V = Vec<MR>;
    const int64_t step = inputs * outputs, next = 9 * (turned ? 1 : inputs);
    for (int64_t p = 0; p < outputs; p += MR)
        for (int64_t c = 0; c < inputs; ++c) {
            const float* from = w + 9 * (turned ? c * outputs + p : p * inputs + c);
            float g[9][MR];
            for (int64_t o = 0; o < MR; ++o)
                for (int k = 0; k < 9; ++k) g[k][o] = from[o * next + k];
            V r[3][3];
            for (int i = 0; i < 3; ++i)
                for (int j = 0; j < 3; ++j) r[i][j] = load<V>(g[turned ? 8 - 3 * i - j : 3 * i + j]);
            V t[4][3];
            for (int j = 0; j < 3; ++j) {
                const V ends = 0.5f * (r[0][j] + r[2][j]), half = 0.5f * r[1][j];
                t[0][j] = r[0][j];
                t[1][j] = ends + half;
                t[2][j] = ends - half;
                t[3][j] = r[2][j];
            }
            float* to = u + p * inputs + c * MR;
            for (int i = 0; i < 4; ++i) {
                const V ends = 0.5f * (t[i][0] + t[i][2]), half = 0.5f * t[i][1];
                store<V>(to + 4 * i * step, t[i][0]);
                store<V>(to + (4 * i + 1) * step, ends + half);
                store<V>(to + (4 * i + 2) * step, ends - half);
                store<V>(to + (4 * i + 3) * step, t[i][2]);
            }
        }
}

// What is convolved: planes of ``height`` in ``groups`` whose channels stand side by side, cut into units and blocks of them.
template <int N, bool SQUARE> struct Work {
    int64_t images, groups, inputs, outputs, height;
    int64_t plane = height * Unit<N, SQUARE>::WIDTH, rows = SQUARE ? 1 : height / 2;
    int64_t units = SQUARE ? (images + 1) / 2 : images * rows, block = 2 * NR * LANES / N, blocks = (units + block - 1) / block;
    int64_t wide = block * N;
    // Apart by more than a block, or the 16 places of a tile would fall on the same few lines of the cache.
    int64_t in = inputs * wide + 16, out = outputs * wide + 16;

    // f(unit in the block, where the plane of the channel begins, its place) for each unit of a block.
    template <class F>
    inline void each(int64_t b, int64_t channels, int64_t channel, const F& f) const {
        const int64_t count = inside(b), image = groups * channels * plane;
        for (int64_t k = 0; k < count; ++k) {
            const int64_t unit = b * block + k;
            if constexpr (SQUARE) f(k, 2 * unit * image + channel * plane, 2 * unit + 1 < images ? image : 0);
            else f(k, unit / rows * image + channel * plane, unit % rows);
        }
    }
    int64_t inside(int64_t b) const { return std::min(block, units - b * block); }
};

template <int N, bool SQUARE>
void convolve(const Work<N, SQUARE>& of, const float* x, const float* w, const float* bias, float* y, bool turned) {
    using U = Unit<N, SQUARE>;
    const int64_t size = 16 * of.inputs * of.outputs;
    auto transformed = [&](int64_t g, float* u) { filters(w + g * of.inputs * of.outputs * 9, u, of.outputs, of.inputs, turned); };
    auto one = [&](int64_t g, int64_t b, const float* u) {
        float* v = scratch(0, 16 * of.in);
        float* m = scratch(1, 16 * of.out);
        for (int64_t c = 0; c < of.inputs; ++c)
            of.each(b, of.inputs, g * of.inputs + c, [&](int64_t k, int64_t at, int64_t row) {
                U::split(x + at, of.height, row, v + c * of.wide + k * N, of.in);
            });
        const int64_t vectors = (of.inside(b) * N + LANES - 1) / LANES;
        for (int64_t xi = 0; xi < 16; ++xi)
            columns<false>(vectors, of.outputs, of.inputs, u + xi * of.inputs * of.outputs, MR, 1, MR * of.inputs, v + xi * of.in,
                           of.wide, m + xi * of.out, of.wide);
        for (int64_t o = 0; o < of.outputs; ++o) {
            const float shift = bias ? bias[g * of.outputs + o] : 0.f;
            of.each(b, of.outputs, g * of.outputs + o, [&](int64_t k, int64_t at, int64_t row) {
                U::join(m + o * of.wide + k * N, of.out, shift, y + at, row);
            });
        }
    };
    if (of.groups >= SLICES) {  // a group's filters stay where they are used
#pragma omp parallel for
        for (int64_t g = 0; g < of.groups; ++g) {
            float* u = scratch(3, size);
            transformed(g, u);
            for (int64_t b = 0; b < of.blocks; ++b) one(g, b, u);
        }
        return;
    }
    float* u = scratch(3, of.groups * size);
#pragma omp parallel for if (of.groups > 1)
    for (int64_t g = 0; g < of.groups; ++g) transformed(g, u + g * size);
#pragma omp parallel for collapse(2) if (of.groups * of.blocks > 1)
    for (int64_t g = 0; g < of.groups; ++g)
        for (int64_t b = 0; b < of.blocks; ++b) one(g, b, u + g * size);
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

// G' m G of the sums of a group: gw[o][c][9].
void filtered(const float* sum, float* gw, int64_t outputs, int64_t inputs, int64_t columns) {
    const int64_t step = outputs * columns;
    for (int64_t o = 0; o < outputs; ++o)
        for (int64_t c = 0; c < inputs; ++c) {
            const float* m = sum + o * columns + c;
            float h[3][4];
            for (int k = 0; k < 4; ++k) {
                const float p = m[k * step], q = m[(4 + k) * step], r = m[(8 + k) * step], s = m[(12 + k) * step];
                h[0][k] = p + 0.5f * (q + r);
                h[1][k] = 0.5f * (q - r);
                h[2][k] = s + 0.5f * (q + r);
            }
            float* to = gw + (o * inputs + c) * 9;
            for (int k = 0; k < 3; ++k) {
                to[3 * k] = h[k][0] + 0.5f * (h[k][1] + h[k][2]);
                to[3 * k + 1] = 0.5f * (h[k][1] - h[k][2]);
                to[3 * k + 2] = h[k][3] + 0.5f * (h[k][1] + h[k][2]);
            }
        }
}

template <int N, bool SQUARE>
void weights(const Work<N, SQUARE>& of, const float* x, const float* gy, float* gw) {
    using U = Unit<N, SQUARE>;
    const int64_t columns = (of.inputs + PAIR - 1) / PAIR * PAIR, size = 16 * of.outputs * columns;
    const int64_t slices = std::min(SLICES, (of.blocks + 7) / 8);
    auto one = [&](int64_t g, int64_t s, float* sum) {
        float* v = scratch(0, 16 * 4 * of.wide);  // of four channels
        float* d = scratch(1, 16 * of.out);
        float* t = scratch(2, 16 * columns * of.wide);  // v of all, turned: [xi][c / PAIR][tile][c % PAIR]
        std::memset(sum, 0, size * sizeof(float));
        for (int64_t b = of.blocks * s / slices; b < of.blocks * (s + 1) / slices; ++b) {
            const int64_t tiles = of.inside(b) * N;
            for (int64_t c = 0; c < of.inputs; c += 4) {
                for (int64_t e = 0; e < 4; ++e)
                    of.each(b, of.inputs, g * of.inputs + c + e, [&](int64_t k, int64_t at, int64_t row) {
                        U::split(x + at, of.height, row, v + e * of.wide + k * N, 4 * of.wide);
                    });
                for (int64_t xi = 0; xi < 16; ++xi) {
                    float* to = t + (xi * columns + c / PAIR * PAIR) * of.wide + c % PAIR;
                    for (int64_t k = 0; k < tiles; k += 4) turn(v + xi * 4 * of.wide + k, of.wide, to + k * PAIR, PAIR);
                }
            }
            for (int64_t o = 0; o < of.outputs; ++o)
                of.each(b, of.outputs, g * of.outputs + o, [&](int64_t k, int64_t at, int64_t row) {
                    U::spread(gy + at, row, d + o * of.wide + k * N, of.out);
                });
            for (int64_t xi = 0; xi < 16; ++xi)
                for (int64_t n = 0; n < columns; n += PAIR)
                    column<2, true>(of.outputs, tiles, d + xi * of.out, 1, of.wide, MR * of.wide,
                                    t + (xi * columns + n) * of.wide, PAIR, sum + xi * of.outputs * columns + n, columns);
        }
    };
    auto finished = [&](int64_t g, float* sums) {  // the slices of a group, in their order whoever took them
        for (int64_t s = 1; s < slices; ++s)
            for (int64_t i = 0; i < size; ++i) sums[i] += sums[s * size + i];
        filtered(sums, gw + g * of.outputs * of.inputs * 9, of.outputs, of.inputs, columns);
    };
    if (of.groups >= SLICES) {  // a group's sums stay where they are used
#pragma omp parallel for
        for (int64_t g = 0; g < of.groups; ++g) {
            float* sums = scratch(4, slices * size);
            for (int64_t s = 0; s < slices; ++s) one(g, s, sums + s * size);
            finished(g, sums);
        }
        return;
    }
    float* sums = scratch(3, of.groups * slices * size);
#pragma omp parallel for collapse(2) if (of.groups * slices > 1)
    for (int64_t g = 0; g < of.groups; ++g)
        for (int64_t s = 0; s < slices; ++s) one(g, s, sums + (g * slices + s) * size);
    for (int64_t g = 0; g < of.groups; ++g) finished(g, sums + g * slices * size);
}

// A convolution of few channels, in pieces of some rows of the result: whole vectors.
struct Few {
    int64_t images, groups, inputs, outputs, height, width, padding;
    int64_t out_height = height + 2 * padding - 2, out_width = width + 2 * padding - 2, plane = out_height * out_width;
    int64_t taps = 9 * inputs, least = out_width % LANES ? LANES / 8 : 1;
    int64_t rows = std::max(least, 128 / out_width / least * least), wide = rows * out_width;

    int64_t pixels(int64_t first) const { return std::min(rows, out_height - first) * out_width; }

    int64_t row = width + 2 * padding, framed_plane = (height + 2 * padding) * row;  // of an image within its padding

    // An image within its padding.
    const float* framed(const float* x) const {
        float* to = scratch(1, inputs * framed_plane);
        std::memset(to, 0, inputs * framed_plane * sizeof(float));
        for (int64_t c = 0; c < inputs; ++c)
            for (int64_t i = 0; i < height; ++i, x += width)
                std::memcpy(to + c * framed_plane + (i + padding) * row + padding, x, width * sizeof(float));
        return to;
    }

    // f(where in [c, i, j][pixel], where in a framed image): eight pixels of each place of a filter, from row ``first`` of the
    // result on.
    template <class F>
    inline void each_place(int64_t first, const F& f) const {
        const int64_t lines = pixels(first) / out_width;
        for (int64_t tap = 0; tap < taps; ++tap) {
            const int64_t corner = tap / 9 * framed_plane + (first + tap / 3 % 3) * row + tap % 3;
            for (int64_t r = 0; r < lines; ++r)
                for (int64_t q = 0; q < out_width; q += 8) f(tap * wide + r * out_width + q, corner + r * row + q);
        }
    }

    // to[c, i, j][pixel]: the planes of a framed image, shifted by each place.
    void shifted(const float* x, int64_t first, float* to) const {
        each_place(first, [&](int64_t at, int64_t from) { store(to + at, load<Vec<8>>(x + from)); });
    }

    // then(which image and group): its planes lie in y, and in the cache.
    template <class F>
    void convolve(const float* x, const float* w, const float* bias, float* y, const F& then) const {
        const int64_t depth = taps + 1;  // the last is the bias, of a plane of ones
        float* f = scratch(3, groups * outputs * depth);
        for (int64_t o = 0; o < groups * outputs; ++o)
            for (int64_t k = 0; k < depth; ++k)
                f[(o / MR * depth + k) * MR + o % MR] = k < taps ? w[o * taps + k] : bias ? bias[o] : 0.f;
#pragma omp parallel for collapse(2) if (images * groups > 1)
        for (int64_t n = 0; n < images; ++n)
            for (int64_t g = 0; g < groups; ++g) {
                float* right = scratch(0, depth * wide);
                std::fill(right + taps * wide, right + depth * wide, 1.f);
                const float* image = framed(x + (n * groups + g) * inputs * height * width);
                for (int64_t first = 0; first < out_height; first += rows) {
                    shifted(image, first, right);
                    columns<false>(pixels(first) / LANES, outputs, depth, f + g * outputs * depth, MR, 1, MR * depth, right, wide,
                                   y + (n * groups + g) * outputs * plane + first * out_width, plane);
                }
                then(n * groups + g);
            }
    }

    // The transpose of ``convolve``: what each place of a filter gives its pixel, added up where the places overlap.
    void back(const float* gy, const float* w, float* gx) const {
        const int64_t padded = (taps + MR - 1) / MR * MR, size = padded * outputs;
        float* f = scratch(3, groups * size);
        for (int64_t g = 0; g < groups; ++g)
            for (int64_t k = 0; k < padded; ++k)
                for (int64_t o = 0; o < outputs; ++o)
                    f[g * size + (k / MR * outputs + o) * MR + k % MR] = k < taps ? w[(g * outputs + o) * taps + k] : 0.f;
#pragma omp parallel for collapse(2) if (images * groups > 1)
        for (int64_t n = 0; n < images; ++n)
            for (int64_t g = 0; g < groups; ++g) {
                float* given = scratch(0, padded * wide);
                float* frame = scratch(1, inputs * framed_plane);
                std::memset(frame, 0, inputs * framed_plane * sizeof(float));
                for (int64_t first = 0; first < out_height; first += rows) {
                    columns<false>(pixels(first) / LANES, padded, outputs, f + g * size, MR, 1, MR * outputs,
                                   gy + (n * groups + g) * outputs * plane + first * out_width, plane, given, wide);
                    each_place(first, [&](int64_t from, int64_t to) {
                        store(frame + to, load<Vec<8>>(frame + to) + load<Vec<8>>(given + from));
                    });
                }
                float* to = gx + (n * groups + g) * inputs * height * width;
                for (int64_t c = 0; c < inputs; ++c)
                    for (int64_t i = 0; i < height; ++i, to += width)
                        std::memcpy(to, frame + c * framed_plane + (i + padding) * row + padding, width * sizeof(float));
            }
    }

    // given(which image and group): the gradient in its planes.
    template <class F>
    void weights(const float* x, const F& given, float* gw) const {
        const int64_t padded = (taps + PAIR - 1) / PAIR * PAIR, size = outputs * padded;
        const int64_t slices = std::min(SLICES, (images + 3) / 4);
        float* sums = scratch(3, groups * slices * size);
#pragma omp parallel for collapse(2) if (groups * slices > 1)
        for (int64_t g = 0; g < groups; ++g)
            for (int64_t s = 0; s < slices; ++s) {
                float* left = scratch(0, padded * wide);  // rows beyond the taps end in columns that nobody reads
                float* right = scratch(2, padded * wide);
                float* sum = sums + (g * slices + s) * size;
                std::memset(sum, 0, size * sizeof(float));
                for (int64_t n = images * s / slices; n < images * (s + 1) / slices; ++n) {
                    const float* gy = given(n * groups + g);
                    const float* image = framed(x + (n * groups + g) * inputs * height * width);
                    for (int64_t first = 0; first < out_height; first += rows) {
                        shifted(image, first, left);
                        for (int64_t k = 0; k < padded; k += 4)
                            for (int64_t p = 0; p < pixels(first); p += 4)
                                turn(left + k * wide + p, wide, right + (k / PAIR * wide + p) * PAIR + k % PAIR, PAIR);
                        const float* from = gy + first * out_width;
                        for (int64_t k = 0; k < padded; k += PAIR)
                            column<2, true>(outputs, pixels(first), from, 1, plane, MR * plane, right + k * wide, PAIR, sum + k, padded);
                    }
                }
            }
        for (int64_t g = 0; g < groups; ++g)
            for (int64_t o = 0; o < outputs; ++o)
                for (int64_t k = 0; k < taps; ++k) {
                    float total = 0;
                    for (int64_t s = 0; s < slices; ++s) total += sums[(g * slices + s) * size + o * padded + k];
                    gw[(g * outputs + o) * taps + k] = total;
                }
    }
};

}  // namespace

#define SIZES(CALL, ...)                                                                                      \
    if (width == 4) CALL((Work<8, true>{images, groups, inputs, outputs, height}), __VA_ARGS__);                \
    else if (width == 8) CALL((Work<4, false>{images, groups, inputs, outputs, height}), __VA_ARGS__);          \
    else if (width == 16) CALL((Work<8, false>{images, groups, inputs, outputs, height}), __VA_ARGS__);         \
    else CALL((Work<16, false>{images, groups, inputs, outputs, height}), __VA_ARGS__);

// x [images, groups * inputs, height, width] to y [images, groups * outputs, height, width].
extern "C" void convolve_float32(const float* x, const float* w, const float* bias, float* y, int64_t images, int64_t groups,
                                 int64_t inputs, int64_t outputs, int64_t height, int64_t width, int64_t turned) {
    SIZES(convolve, x, w, bias, y, turned != 0)
}

// The gradient in w [groups * outputs, inputs, 3, 3] from that in y.
extern "C" void weights_float32(const float* x, const float* gy, float* gw, int64_t images, int64_t groups, int64_t inputs,
                                int64_t outputs, int64_t height, int64_t width) {
    SIZES(weights, x, gy, gw)
}

extern "C" void few_convolve_float32(const float* x, const float* w, const float* bias, float* y, int64_t images, int64_t groups,
                                     int64_t inputs, int64_t outputs, int64_t height, int64_t width, int64_t padding) {
    Few{images, groups, inputs, outputs, height, width, padding}.convolve(x, w, bias, y, [](int64_t) {});
}

extern "C" void few_weights_float32(const float* x, const float* gy, float* gw, int64_t images, int64_t groups, int64_t inputs,
                                    int64_t outputs, int64_t height, int64_t width, int64_t padding) {
    const Few of{images, groups, inputs, outputs, height, width, padding};
    of.weights(x, [&](int64_t at) { return gy + at * outputs * of.plane; }, gw);
}

// The convolution, and norm, ReLU and pooling of planes that are still in the cache.
extern "C" void few_block_float32(const float* x, const float* w, const float* bias, const float* gamma, const float* beta,
                                  float* z, float* y, float* means, float* rstds, int64_t images, int64_t groups, int64_t inputs,
                                  int64_t outputs, int64_t height, int64_t width, int64_t padding, double epsilon) {
    const Few of{images, groups, inputs, outputs, height, width, padding};
    const int64_t h = of.out_height, wide = of.out_width, pooled = (h / 2) * (wide / 2);
    of.convolve(x, w, bias, z, [&](int64_t at) {
        const int64_t row = at * outputs, channel = at % groups * outputs;
        forward_float32(z + row * of.plane, gamma + channel, beta + channel, y + row * pooled, means + row, rstds + row, outputs,
                        outputs, h, wide, epsilon);
    });
}

// The gradient in w from that in the block's result; that in z is forgotten plane by plane.
extern "C" void few_slope_float32(const float* g, const float* x, const float* z, const float* gamma, const float* beta,
                                  const float* means, const float* rstds, float* ggamma, float* gbeta, float* gw, int64_t images,
                                  int64_t groups, int64_t inputs, int64_t outputs, int64_t height, int64_t width, int64_t padding) {
    const Few of{images, groups, inputs, outputs, height, width, padding};
    const int64_t h = of.out_height, wide = of.out_width, pooled = (h / 2) * (wide / 2);
    of.weights(x, [&](int64_t at) {
        const int64_t row = at * outputs, channel = at % groups * outputs;
        float* gz = scratch(4, outputs * of.plane);
        backward_float32(g + row * pooled, z + row * of.plane, gamma + channel, beta + channel, means + row, rstds + row, gz,
                         ggamma + row, gbeta + row, outputs, outputs, h, wide);
        return gz;
    }, gw);
}

// The gradient in x from that in y.
extern "C" void few_back_float32(const float* gy, const float* w, float* gx, int64_t images, int64_t groups, int64_t inputs,
                                 int64_t outputs, int64_t height, int64_t width, int64_t padding) {
    Few{images, groups, inputs, outputs, height, width, padding}.back(gy, w, gx);
}
