// The block of a 3 x 3 convolution of few channels, norm, ReLU and pooling, in planes so small that all of it stays in the nearest
// cache. A vector holds eight channels of the result; pixels come one after another. So no lane is empty, however few the filters'
// numbers are, and no sum goes across a vector. The convolution's result is not written down: to find it again in the backward
// pass is less work than to fetch it.

#pragma once

#include "few.h"

namespace {

constexpr int64_t MOST_PIXELS = 256;  // of a plane: as many numbers has a small image (``SMALL`` in convolutions.py)

// Eight channels at a time. What one channel finds depends on no other.
struct Small : Sizes {
    static constexpr int64_t AT_ONCE = 8;  // pixels of a row
    static constexpr int64_t N = 8;        // channels of a vector

    int64_t filter = (taps + 1) * N, blocks = groups * outputs / N, pooled = plane / 4;

    // Filters and biases with their channels side by side: [block][tap, the last is the bias][channel].
    const float* side_by_side(const float* w, const float* bias) const {
        float* to = scratch(3, blocks * filter);
        for (int64_t o = 0; o < blocks * N; ++o)
            for (int64_t k = 0; k <= taps; ++k) to[o / N * filter + k * N + o % N] = k < taps ? w[o * taps + k] : bias[o];
        return to;
    }

    // The convolution of a framed image, z[pixel]; its sum over pixels.
    INLINE Eight convolve(const float* image, const float* f, Eight* z) const {
        Eight total{};
        for (int64_t i = 0; i < out_height; ++i)
            for (int64_t j = 0; j < out_width; j += AT_ONCE) {
                Eight sum[AT_ONCE];
#pragma GCC unroll 8
                for (int t = 0; t < AT_ONCE; ++t) sum[t] = load<Eight>(f + taps * N);
                for (int64_t line = 0; line < 3 * inputs; ++line) {
                    const float* from = image + line / 3 * framed_plane + (i + line % 3) * row + j;
#pragma GCC unroll 3
                    for (int k = 0; k < 3; ++k) {
                        const Eight weight = load<Eight>(f + (3 * line + k) * N);
#pragma GCC unroll 8
                        for (int t = 0; t < AT_ONCE; ++t) sum[t] += from[t + k] * weight;
                    }
                }
                Eight* to = z + i * out_width + j;
#pragma GCC unroll 8
                for (int t = 0; t < AT_ONCE; ++t) to[t] = sum[t];
                total += added(sum);
            }
        return total;
    }

    void forward(const float* x, const float* w, const float* bias, const float* gamma, const float* beta, float* z, float* y,
                 float* means, float* rstds, float epsilon) const {
        const float* filters = side_by_side(w, bias);
        const float share = 1.f / plane;
#pragma omp parallel for collapse(2) if (images * groups > 1)
        for (int64_t n = 0; n < images; ++n)
            for (int64_t g = 0; g < groups; ++g) {
                const float* image = framed(x + (n * groups + g) * inputs * height * width);
                Eight found[MOST_PIXELS], small[MOST_PIXELS / 4];
                for (int64_t channel = g * outputs; channel < (g + 1) * outputs; channel += N) {
                    const Eight mean = share * convolve(image, filters + channel / N * filter, found);
                    Eight square{};
                    for (int64_t p = 0; p < plane; p += AT_ONCE) {
                        Eight away[AT_ONCE];
#pragma GCC unroll 8
                        for (int t = 0; t < AT_ONCE; ++t) away[t] = (found[p + t] - mean) * (found[p + t] - mean);
                        square += added(away);
                    }
                    const Eight rstd = one_over_root(share * square + epsilon);
                    const Eight scale = load<Eight>(gamma + channel) * rstd, shift = load<Eight>(beta + channel) - mean * scale;
                    auto let = [&](const Eight& at) INLINED {
                        const Eight a = at * scale + shift;
                        return a < 0.f ? Eight{} : a;
                    };
                    for (int64_t i = 0, q = 0; i < out_height; i += 2)
                        for (int64_t j = 0; j < out_width; j += 2, ++q) {
                            const Eight* c = found + i * out_width + j;
                            small[q] = 0.25f * ((let(c[0]) + let(c[out_width])) + (let(c[1]) + let(c[out_width + 1])));
                        }
                    const int64_t at = n * groups * outputs + channel;
                    write_planes(small, pooled, y + at * pooled);
                    if (z) write_planes(found, plane, z + at * plane);
                    store<Eight>(means + at, mean);
                    store<Eight>(rstds + at, rstd);
                }
            }
    }

    // The gradient in w, gamma and beta (of these by image) from that in the block's result.
    void slope(const float* gy, const float* x, const float* w, const float* bias, const float* gamma, const float* beta,
               const float* means, const float* rstds, float* ggamma, float* gbeta, float* gw) const {
        const float* filters = side_by_side(w, bias);
        const float share = 1.f / plane;
        const int64_t slices = std::min(SLICES, (images + 3) / 4), size = outputs * taps;
        float* sums = scratch(4, groups * slices * size);
#pragma omp parallel for collapse(2) if (groups * slices > 1)
        for (int64_t g = 0; g < groups; ++g)
            for (int64_t s = 0; s < slices; ++s) {
                float* sum = sums + (g * slices + s) * size;
                std::memset(sum, 0, size * sizeof(float));
                Eight hat[MOST_PIXELS], u[MOST_PIXELS], small[MOST_PIXELS / 4];
                for (int64_t n = images * s / slices; n < images * (s + 1) / slices; ++n) {
                    const float* image = framed(x + (n * groups + g) * inputs * height * width);
                    for (int64_t o = 0; o < outputs; o += N) {
                        const int64_t channel = g * outputs + o, at = n * groups * outputs + channel;
                        convolve(image, filters + channel / N * filter, hat);
                        read_planes(gy + at * pooled, pooled, small);
                        const Eight weight = load<Eight>(gamma + channel), mean = load<Eight>(means + at), rstd = load<Eight>(rstds + at);
                        // As in the forward pass, to the last bit: a mask that differs would be another function's.
                        const Eight scale = weight * rstd, shift = load<Eight>(beta + channel) - mean * scale;
                        Eight su{}, suh{};
                        auto let = [&](int64_t p, const Eight& given) INLINED {
                            u[p] = hat[p] * scale + shift > 0.f ? given : Eight{};
                            hat[p] = (hat[p] - mean) * rstd;
                        };
                        for (int64_t i = 0, q = 0; i < out_height; i += 2)
                            for (int64_t j = 0; j < out_width; j += 2, ++q) {
                                const Eight given = 0.25f * small[q];
                                const int64_t p = i * out_width + j;
                                let(p, given);
                                let(p + 1, given);
                                let(p + out_width, given);
                                let(p + out_width + 1, given);
                                const Eight *v = u + p, *h = hat + p;
                                su += (v[0] + v[1]) + (v[out_width] + v[out_width + 1]);
                                suh += (v[0] * h[0] + v[1] * h[1]) + (v[out_width] * h[out_width] + v[out_width + 1] * h[out_width + 1]);
                            }
                        const Eight mu = share * su, muh = share * suh;
                        for (int64_t p = 0; p < plane; ++p) u[p] = scale * (u[p] - mu - hat[p] * muh);
                        for (int64_t c = 0; c < inputs; ++c) filter_of(image + c * framed_plane, u, sum + o * taps + 9 * N * c);
                        store<Eight>(ggamma + at, suh);
                        store<Eight>(gbeta + at, su);
                    }
                }
            }
        for (int64_t g = 0; g < groups; ++g)
            for (int64_t o = 0; o < outputs; ++o)
                for (int64_t k = 0; k < taps; ++k) {
                    float total = 0;
                    for (int64_t s = 0; s < slices; ++s) total += sums[(g * slices + s) * size + o / N * N * taps + k * N + o % N];
                    gw[(g * outputs + o) * taps + k] = total;
                }
    }

    // The gradient in the filters of one channel of a framed image from that in z, added to sum[tap][channel].
    INLINE void filter_of(const float* image, const Eight* gz, float* sum) const {
        constexpr int PIXELS = 4;  // of a row at once: a number of the image meets three places of the filter
        Eight found[9] = {};
        for (int64_t i = 0; i < out_height; ++i)
            for (int64_t j = 0; j < out_width; j += PIXELS) {
                Eight v[PIXELS];
#pragma GCC unroll 4
                for (int t = 0; t < PIXELS; ++t) v[t] = gz[i * out_width + j + t];
#pragma GCC unroll 3
                for (int a = 0; a < 3; ++a)
#pragma GCC unroll 6
                    for (int t = 0; t < PIXELS + 2; ++t) {
                        const float at = image[(i + a) * row + j + t];
#pragma GCC unroll 3
                        for (int b = 0; b < 3; ++b)
                            if (t >= b && t - b < PIXELS) found[3 * a + b] += at * v[t - b];
                    }
            }
#pragma GCC unroll 9
        for (int k = 0; k < 9; ++k) store<Eight>(sum + k * N, load<Eight>(sum + k * N) + found[k]);
    }
};

}  // namespace
