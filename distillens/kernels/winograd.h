// 3 x 3 convolutions of many channels, padded by one, in planes of even height that are 8, 16 or 32 wide: Winograd's minimal
// filtering F(2 x 2, 3 x 3), 16 products for every 2 x 2 results and channel, where the sum over the filter takes 36:
//
//   y = A' [ (G g G') * (B' d B) ] A      d: 4 x 4 of the image (a tile), g: a filter, y: 2 x 2 of the result
//
// The 16 places of a tile (xi) are 16 matrix products over channels. The gradient in a filter is the transpose of the same
// lines: G' [ (A dy A') * (B' d B) ] G, summed over tiles.

#pragma once

#include "panels.h"

namespace {

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

// A unit is a row of N tiles, of planes 2N wide; ``place`` says which row.
template <int N> struct Unit {
    using V = Vec<N>;
    static constexpr int64_t WIDTH = 2 * N;

    static inline void across(const V& left, const V& even, const V& odd, const V& right, float* to, int64_t step) {
        store<V>(to, left - odd);
        store<V>(to + step, even + odd);
        store<V>(to + 2 * step, odd - even);
        store<V>(to + 3 * step, even - right);
    }

    // x: the plane; to[xi * step]
    static inline void split(const float* x, int64_t height, int64_t place, float* to, int64_t step) {
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

    // The transpose of ``join``: 2 x 2 numbers of each tile to 16.
    static inline void spread(const float* y, int64_t place, float* to, int64_t step) {
        const float* row = y + 2 * place * WIDTH;
        V p = load<V>(row), q = load<V>(row + N);
        const V e0 = evens<N>(p, q, Each<N>{}), o0 = odds<N>(p, q, Each<N>{});
        p = load<V>(row + WIDTH); q = load<V>(row + WIDTH + N);
        const V e1 = evens<N>(p, q, Each<N>{}), o1 = odds<N>(p, q, Each<N>{});
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
        float* row = y + 2 * place * WIDTH;
        store<V>(row, low<N>(y00, y01, Each<N>{}));
        store<V>(row + N, high<N>(y00, y01, Each<N>{}));
        store<V>(row + WIDTH, low<N>(y10, y11, Each<N>{}));
        store<V>(row + WIDTH + N, high<N>(y10, y11, Each<N>{}));
    }
};

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
template <int N> struct Work {
    int64_t images, groups, inputs, outputs, height;
    int64_t plane = height * Unit<N>::WIDTH, rows = height / 2;
    int64_t units = images * rows, block = 2 * NR * LANES / N, blocks = (units + block - 1) / block;
    int64_t wide = block * N;
    // Apart by more than a block, or the 16 places of a tile would fall on the same few lines of the cache.
    int64_t in = inputs * wide + 16, out = outputs * wide + 16;

    // f(unit in the block, where the plane of the channel begins, its place) for each unit of a block.
    template <class F>
    inline void each(int64_t b, int64_t channels, int64_t channel, const F& f) const {
        for (int64_t k = 0; k < inside(b); ++k) {
            const int64_t unit = b * block + k;
            f(k, (unit / rows * groups * channels + channel) * plane, unit % rows);
        }
    }
    int64_t inside(int64_t b) const { return std::min(block, units - b * block); }

    int64_t filters = 16 * inputs * outputs;  // numbers of a group's, transformed
};

template <int N>
void convolve(const Work<N>& of, const float* x, const float* w, const float* bias, float* y, bool turned) {
    using U = Unit<N>;
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
    by_block(of.groups, of.blocks, of.filters, transformed, one);
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

template <int N>
void weights(const Work<N>& of, const float* x, const float* gy, float* gw) {
    using U = Unit<N>;
    const int64_t columns = (of.inputs + PAIR - 1) / PAIR * PAIR, size = 16 * of.outputs * columns;
    auto one = [&](int64_t g, int64_t first, int64_t last, float* sum) {
        float* v = scratch(0, 16 * 4 * of.wide);  // of four channels
        float* d = scratch(1, 16 * of.out);
        float* t = scratch(2, 16 * columns * of.wide);  // v of all, turned: [xi][c / PAIR][tile][c % PAIR]
        std::memset(sum, 0, size * sizeof(float));
        for (int64_t b = first; b < last; ++b) {
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
    auto finished = [&](int64_t g, const float* sum) {
        filtered(sum, gw + g * of.outputs * of.inputs * 9, of.outputs, of.inputs, columns);
    };
    by_slice(of.groups, of.blocks, std::min(SLICES, (of.blocks + 7) / 8), size, one, finished);
}

}  // namespace
