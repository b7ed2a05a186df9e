// 3 x 3 convolutions of planes of 4 x 4, padded by one. If a row is bent to a ring of five, x_0 = 0, x_1 .. x_4, the padding on its
// left and that on its right are the same zero, and
//
//   y_i = w_- x_(i-1) + w_0 x_i + w_+ x_(i+1)      indices modulo 5, i = 1 .. 4
//
// The Fourier transform of length five, along and across, makes products of it place by place: one of real numbers and twelve of
// complex ones, the other twelve places being their conjugates. A complex product takes three real ones (Gauss):
//
//   W X = (k1 - k3) + i (k1 + k2)      k1 = w_r (x_r + x_i), k2 = (w_i - w_r) x_r, k3 = (w_r + w_i) x_i
//
// That is 37 products for a plane and a pair of channels; F(2 x 2, 3 x 3) takes 64 and the sum over the filter 144. The transform is
// orthogonal: errors are those of the sum. The 37 (``PLACES``) are matrix products over channels whose rows are images. The gradient
// in a filter is the transpose of the same lines.

#pragma once

#include "vectors.h"

namespace {

constexpr int64_t PLACES = 37;
constexpr float C1 = 0.30901699437494742f, C2 = -0.80901699437494742f;  // cos(2 pi / 5), cos(4 pi / 5)
constexpr float S1 = 0.95105651629515357f, S2 = 0.58778525229247313f;   // sin(2 pi / 5), sin(4 pi / 5)
// What a product counts for in the plane, once for a place and its conjugate: a factor of the filter.
constexpr float ONCE = 1.f / 25, TWICE = 2.f / 25;

// The transform of real numbers on a ring: at 0, and its real and imaginary parts at 1 and 2.
struct Five {
    Eight zero, re1, im1, re2, im2;
};
struct Complex {
    Eight re, im;
};

// Of a row of four, 0 before and after it.
INLINE Five transformed(const Eight& a, const Eight& b, const Eight& c, const Eight& d) {
    const Eight p = a + d, q = b + c, m = d - a, n = c - b;
    return {p + q, C1 * p + C2 * q, S1 * m + S2 * n, C2 * p + C1 * q, S2 * m - S1 * n};
}

// Of a row of a filter: the ring's numbers -1, 0 and 1. It meets the row the other way round, as the conjugate.
INLINE Five transformed(const Eight& a, const Eight& b, const Eight& c) {
    const Eight p = a + c, m = c - a;
    return {p + b, b + C1 * p, S1 * m, b + C2 * p, S2 * m};
}

// Their transposes.
template <int N> INLINE void row_of(const Five& f, Eight* to) {
    const Eight p = f.zero + C1 * f.re1 + C2 * f.re2, m = S1 * f.im1 + S2 * f.im2;
    to[0] = p - m;
    to[N - 1] = p + m;
    if constexpr (N == 4) {
        const Eight q = f.zero + C2 * f.re1 + C1 * f.re2, n = S2 * f.im1 - S1 * f.im2;
        to[1] = q - n;
        to[2] = q + n;
    } else {
        to[1] = f.zero + f.re1 + f.re2;
    }
}

// The transform of complex numbers at five places from ``first`` on, from those of their real and imaginary parts; its transpose.
template <class P> INLINE void put_together(const Five& p, const Five& q, int first, const P& put) {
    put(first, Complex{p.zero, q.zero});
    put(first + 1, Complex{p.re1 - q.im1, p.im1 + q.re1});
    put(first + 2, Complex{p.re1 + q.im1, q.re1 - p.im1});
    put(first + 3, Complex{p.re2 - q.im2, p.im2 + q.re2});
    put(first + 4, Complex{p.re2 + q.im2, q.re2 - p.im2});
}
template <class G> INLINE void taken_apart(int first, const G& get, Five& p, Five& q) {
    const Complex a = get(first), b = get(first + 1), c = get(first + 2), d = get(first + 3), e = get(first + 4);
    p = {a.re, b.re + c.re, b.im - c.im, d.re + e.re, d.im - e.im};
    q = {a.im, b.im + c.im, c.re - b.re, d.im + e.im, e.re - d.re};
}

// Of four rows of four, or three of three: zero(its one real number), put(k, the complex number k = 0 .. 11).
template <int N, class Z, class P> INLINE void spectrum(const Eight* x, const Z& zero, const P& put) {
    Five row[N];
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) {
        if constexpr (N == 4) row[i] = transformed(x[4 * i], x[4 * i + 1], x[4 * i + 2], x[4 * i + 3]);
        else row[i] = transformed(x[3 * i], x[3 * i + 1], x[3 * i + 2]);
    }
    auto across = [&](Eight Five::*part) INLINED {
        if constexpr (N == 4) return transformed(row[0].*part, row[1].*part, row[2].*part, row[3].*part);
        else return transformed(row[0].*part, row[1].*part, row[2].*part);
    };
    const Five f = across(&Five::zero);
    zero(f.zero);
    put(0, Complex{f.re1, f.im1});
    put(1, Complex{f.re2, f.im2});
    put_together(across(&Five::re1), across(&Five::im1), 2, put);
    put_together(across(&Five::re2), across(&Five::im2), 7, put);
}

// Its transpose: get(k) is what put(k) was given.
template <int N, class G> INLINE void plane_of(const Eight& zero, const G& get, Eight* to) {
    Eight part[5][N];
    const Complex a = get(0), b = get(1);
    row_of<N>(Five{zero, a.re, a.im, b.re, b.im}, part[0]);
    Five p, q;
    taken_apart(2, get, p, q);
    row_of<N>(p, part[1]);
    row_of<N>(q, part[2]);
    taken_apart(7, get, p, q);
    row_of<N>(p, part[3]);
    row_of<N>(q, part[4]);
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) row_of<N>(Five{part[0][i], part[1][i], part[2][i], part[3][i], part[4][i]}, to + N * i);
}

// The filters of eight channels, ``next`` apart, place by place, and back to filters side by side.
INLINE void read_filters(const float* filters, int64_t next, Eight* to) {
    Eight most[8];
#pragma GCC unroll 8
    for (int l = 0; l < 8; ++l) most[l] = load<Eight>(filters + l * next);
    transpose(most, to);
    const float* last = filters + 8;
    to[8] = Eight{last[0],        last[next],     last[2 * next], last[3 * next],
                  last[4 * next], last[5 * next], last[6 * next], last[7 * next]};
}
INLINE void write_filters(const Eight* from, float* filters) {
    Eight most[8];
    transpose(from, most);
#pragma GCC unroll 8
    for (int l = 0; l < 8; ++l) {
        store<Eight>(filters + 9 * l, most[l]);
        filters[9 * l + 8] = from[8][l];
    }
}

// C[m][n] = (or +=) sum over k of A[k][m] B[k][n], so many vectors wide. An element's sum has one order, however its tile is cut.
template <bool MORE, int N>
inline void strip(int64_t rows, int64_t depth, const float* a, int64_t ak, int64_t am, const float* b, int64_t bk, float* c,
                  int64_t cm) {
#if defined(__AVX512F__)
    constexpr int MOST = 12;
#else
    constexpr int MOST = 6;
#endif
    int64_t m = 0;
    for (; m + MOST <= rows; m += MOST) tile<MOST, N, MORE>(depth, a + m * am, ak, am, b, bk, c + m * cm, cm);
    for (; m + 4 <= rows; m += 4) tile<4, N, MORE>(depth, a + m * am, ak, am, b, bk, c + m * cm, cm);
    for (; m + 2 <= rows; m += 2) tile<2, N, MORE>(depth, a + m * am, ak, am, b, bk, c + m * cm, cm);
    if (m < rows) tile<1, N, MORE>(depth, a + m * am, ak, am, b, bk, c + m * cm, cm);
}
template <bool MORE>
inline void product(int64_t rows, int64_t vectors, int64_t depth, const float* a, int64_t ak, int64_t am, const float* b,
                    int64_t bk, float* c, int64_t cm) {
    for (; vectors >= 2; vectors -= 2, b += 2 * LANES, c += 2 * LANES) strip<MORE, 2>(rows, depth, a, ak, am, b, bk, c, cm);
    if (vectors) strip<MORE, 1>(rows, depth, a, ak, am, b, bk, c, cm);
}

// What is convolved: images whose ``groups`` of channels stand side by side, in blocks of images.
struct Rings {
    int64_t images, groups, inputs, outputs;
    int64_t block = 24, blocks = (images + block - 1) / block;
    int64_t wide_in = whole(inputs), wide_out = whole(outputs);
    // Between places: a little more than fits, or they would fall on the same few lines of the cache.
    int64_t in = block * wide_in + 16, out = block * wide_out + 16;
    int64_t filter = inputs * wide_out + 16, sum = outputs * wide_in + 16;

    static int64_t whole(int64_t channels) { return (channels + LANES - 1) / LANES * LANES; }
    int64_t inside(int64_t b) const { return std::min(block, images - b * block); }
    int64_t at(int64_t image, int64_t group, int64_t channels) const { return (image * groups + group) * channels * 16; }

    // The next image is far away where other groups stand between: it is asked for in time.
    template <int WRITE> INLINE void ahead(const float* x, int64_t n, int64_t last, int64_t g, int64_t channels) const {
        if (n + 1 < last)
            for (int64_t c = 0; c < channels; ++c) __builtin_prefetch(x + at(n + 1, g, channels) + 16 * c, WRITE);
    }

    // put(where to, complex number) for eight channels of an image each, and where they stand.
    template <class P>
    INLINE void transform(const float* x, int64_t b, int64_t g, int64_t channels, int64_t wide, int64_t step, float* to,
                          const P& put) const {
        const int64_t first = b * block, last = first + inside(b);
        for (int64_t n = first; n < last; ++n) {
            ahead<0>(x, n, last, g, channels);
            for (int64_t c = 0; c < channels; c += 8) {
                Eight pixels[16];
                read_planes(x + at(n, g, channels) + 16 * c, 16, pixels);
                float* place = to + (n - first) * wide + c;
                spectrum<4>(pixels, [&](const Eight& v) INLINED { store<Eight>(place, v); },
                         [&](int k, const Complex& v) INLINED { put(place + (1 + 3 * k) * step, v); });
            }
        }
    }

    // v[place][image][channel], the right side of Gauss' products.
    INLINE void images_of(const float* x, int64_t b, int64_t g, float* v) const {
        const int64_t step = in;
        transform(x, b, g, inputs, wide_in, step, v, [&](float* to, const Complex& z) INLINED {
            store<Eight>(to, z.re + z.im);
            store<Eight>(to + step, z.re);
            store<Eight>(to + 2 * step, z.im);
        });
    }

    // The left side: u[place][input][output] from w[o][c][9] or, ``turned``, from w[c][o][9] with each filter rotated by half a turn,
    // which is the conjugate.
    void filters_of(const float* w, float* u, bool turned) const {
        const int64_t step = filter, next = 9 * (turned ? 1 : inputs);
        const float way = turned ? -TWICE : TWICE;
        for (int64_t o = 0; o < outputs; o += 8)
            for (int64_t c = 0; c < inputs; ++c) {
                Eight places[9];
                read_filters(w + 9 * (turned ? c * outputs + o : o * inputs + c), next, places);
                float* to = u + c * wide_out + o;
                spectrum<3>(places, [&](const Eight& v) INLINED { store<Eight>(to, ONCE * v); },
                         [&](int k, const Complex& z) INLINED {
                             float* place = to + (1 + 3 * k) * step;
                             const Eight re = TWICE * z.re, im = way * z.im;
                             store<Eight>(place, re);
                             store<Eight>(place + step, im - re);
                             store<Eight>(place + 2 * step, re + im);
                         });
            }
    }

    void convolve(const float* x, const float* w, const float* bias, float* y, bool turned) const {
        auto prepared = [&](int64_t g, float* u) { filters_of(w + g * inputs * outputs * 9, u, turned); };
        auto one = [&](int64_t g, int64_t b, const float* u) {
            const int64_t first = b * block, last = first + inside(b), step = out;
            float* v = scratch(0, PLACES * in);
            float* m = scratch(1, PLACES * out);
            images_of(x, b, g, v);
            for (int64_t k = 0; k < PLACES; ++k)
                product<false>(last - first, wide_out / LANES, inputs, v + k * in, 1, wide_in, u + k * filter, wide_out, m + k * out,
                               wide_out);
            for (int64_t n = first; n < last; ++n) {
                ahead<1>(y, n, last, g, outputs);
                for (int64_t o = 0; o < outputs; o += 8) {
                    const float* from = m + (n - first) * wide_out + o;
                    Eight pixels[16];
                    plane_of<4>(load<Eight>(from),
                             [&](int k) INLINED {
                                 const float* place = from + (1 + 3 * k) * step;
                                 const Eight k1 = load<Eight>(place);
                                 return Complex{k1 - load<Eight>(place + 2 * step), k1 + load<Eight>(place + step)};
                             },
                             pixels);
                    if (bias) {
                        const Eight shift = load<Eight>(bias + g * outputs + o);
#pragma GCC unroll 16
                        for (int i = 0; i < 16; ++i) pixels[i] += shift;
                    }
                    write_planes(pixels, 16, y + at(n, g, outputs) + 16 * o);
                }
            }
        };
        by_block(groups, blocks, PLACES * filter, prepared, one);
    }

    void weights(const float* x, const float* gy, float* gw) const {
        auto one = [&](int64_t g, int64_t first, int64_t end, float* sums) {
            const int64_t step = out;
            float* v = scratch(0, PLACES * in);
            float* d = scratch(1, PLACES * out);
            for (int64_t b = first; b < end; ++b) {
                images_of(x, b, g, v);
                transform(gy, b, g, outputs, wide_out, step, d, [&](float* to, const Complex& z) INLINED {
                    store<Eight>(to, z.re + z.im);
                    store<Eight>(to + step, z.im);
                    store<Eight>(to + 2 * step, -z.re);
                });
                auto add = b == first ? product<false> : product<true>;
                for (int64_t k = 0; k < PLACES; ++k)
                    add(outputs, wide_in / LANES, inside(b), d + k * out, wide_out, 1, v + k * in, wide_in, sums + k * sum, wide_in);
            }
        };
        auto finished = [&](int64_t g, const float* sums) {
            for (int64_t o = 0; o < outputs; ++o)
                for (int64_t c = 0; c < inputs; c += 8) {
                    const float* from = sums + o * wide_in + c;
                    Eight places[9];
                    plane_of<3>(ONCE * load<Eight>(from),
                             [&](int k) INLINED {
                                 const float* place = from + (1 + 3 * k) * sum;
                                 const Eight k1 = load<Eight>(place), k2 = load<Eight>(place + sum), k3 = load<Eight>(place + 2 * sum);
                                 return Complex{TWICE * (k1 - k2 + k3), TWICE * (k2 + k3)};
                             },
                             places);
                    write_filters(places, gw + ((g * outputs + o) * inputs + c) * 9);
                }
        };
        by_slice(groups, blocks, std::min(SLICES, (blocks + 3) / 4), PLACES * sum, one, finished);
    }
};

}  // namespace
