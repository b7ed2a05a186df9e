// 3 x 3 convolutions of few channels, the colours of an image: one product of the filters with the nine shifted planes of each.

#pragma once

#include "panels.h"

namespace {

struct Sizes {
    int64_t images, groups, inputs, outputs, height, width, padding;
    int64_t out_height = height + 2 * padding - 2, out_width = width + 2 * padding - 2, plane = out_height * out_width;
    int64_t taps = 9 * inputs;
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
};

// A convolution of few channels, in pieces of some rows of the result: whole vectors.
struct Few : Sizes {
    int64_t least = out_width % LANES ? LANES / 8 : 1;
    int64_t rows = std::max(least, 128 / out_width / least * least), wide = rows * out_width;

    int64_t pixels(int64_t first) const { return std::min(rows, out_height - first) * out_width; }

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

    // then(which image and group, its planes, while they are in the cache); y may be nothing, and they are forgotten.
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
                const int64_t at = n * groups + g;
                float* to = y ? y + at * outputs * plane : scratch(4, outputs * plane);
                float* right = scratch(0, depth * wide);
                std::fill(right + taps * wide, right + depth * wide, 1.f);
                const float* image = framed(x + at * inputs * height * width);
                for (int64_t first = 0; first < out_height; first += rows) {
                    shifted(image, first, right);
                    columns<false>(pixels(first) / LANES, outputs, depth, f + g * outputs * depth, MR, 1, MR * depth, right, wide,
                                   to + first * out_width, plane);
                }
                then(at, to);
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
