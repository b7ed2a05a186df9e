// 3 x 3 convolutions by the form of the planes: few channels at once (few.h; small.h with what follows them), planes of 4 x 4 as rings
// (rings.h), the others, of even height and 8, 16 or 32 wide, in Winograd's products (winograd.h). Work is cut into blocks by what is
// convolved alone, and sums over blocks are taken in slices of their own: neither the number of threads nor the other groups change a
// bit.

#include "few.h"
#include "planes.cpp"
#include "rings.h"
#include "small.h"
#include "winograd.h"

#undef SIZES
#define SIZES(CALL, ...)                                                                              \
    if (width == 4) Rings{images, groups, inputs, outputs}.CALL(__VA_ARGS__);                          \
    else if (width == 8) CALL((Work<4>{images, groups, inputs, outputs, height}), __VA_ARGS__);         \
    else if (width == 16) CALL((Work<8>{images, groups, inputs, outputs, height}), __VA_ARGS__);        \
    else CALL((Work<16>{images, groups, inputs, outputs, height}), __VA_ARGS__);

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
    Few{images, groups, inputs, outputs, height, width, padding}.convolve(x, w, bias, y, [](int64_t, const float*) {});
}

extern "C" void few_weights_float32(const float* x, const float* gy, float* gw, int64_t images, int64_t groups, int64_t inputs,
                                    int64_t outputs, int64_t height, int64_t width, int64_t padding) {
    const Few of{images, groups, inputs, outputs, height, width, padding};
    of.weights(x, [&](int64_t at) { return gy + at * outputs * of.plane; }, gw);
}

// The convolution, and norm, ReLU and pooling of planes that are still in the cache; z may be nothing, and is not written down.
extern "C" void few_block_float32(const float* x, const float* w, const float* bias, const float* gamma, const float* beta,
                                  float* z, float* y, float* means, float* rstds, int64_t images, int64_t groups, int64_t inputs,
                                  int64_t outputs, int64_t height, int64_t width, int64_t padding, double epsilon) {
    const Few of{images, groups, inputs, outputs, height, width, padding};
    const int64_t h = of.out_height, wide = of.out_width, pooled = (h / 2) * (wide / 2);
    of.convolve(x, w, bias, z, [&](int64_t at, const float* planes) {
        const int64_t row = at * outputs, channel = at % groups * outputs;
        forward_float32(planes, gamma + channel, beta + channel, y + row * pooled, means + row, rstds + row, outputs,
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

// The same of a small image: z is written down where it is something.
extern "C" void small_block_float32(const float* x, const float* w, const float* bias, const float* gamma, const float* beta,
                                    float* z, float* y, float* means, float* rstds, int64_t images, int64_t groups, int64_t inputs,
                                    int64_t outputs, int64_t height, int64_t width, int64_t padding, double epsilon) {
    const Small of{images, groups, inputs, outputs, height, width, padding};
    of.forward(x, w, bias, gamma, beta, z, y, means, rstds, static_cast<float>(epsilon));
}

extern "C" void small_slope_float32(const float* g, const float* x, const float* w, const float* bias, const float* gamma,
                                    const float* beta, const float* means, const float* rstds, float* ggamma, float* gbeta,
                                    float* gw, int64_t images, int64_t groups, int64_t inputs, int64_t outputs, int64_t height,
                                    int64_t width, int64_t padding) {
    const Small of{images, groups, inputs, outputs, height, width, padding};
    of.slope(g, x, w, bias, gamma, beta, means, rstds, ggamma, gbeta, gw);
}

// The gradient in x from that in y.
extern "C" void few_back_float32(const float* gy, const float* w, float* gx, int64_t images, int64_t groups, int64_t inputs,
                                 int64_t outputs, int64_t height, int64_t width, int64_t padding) {
    Few{images, groups, inputs, outputs, height, width, padding}.back(gy, w, gx);
}
