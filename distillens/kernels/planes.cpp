// Norm, ReLU and average pooling of one plane (one channel of one image) at a time, forward, backward and twice
// backward, while it lies in the cache. A plane's numbers depend on nothing but the plane: the number of threads and
// the other rows change no bit.
//
//   h = rstd (z - mean),  a = gamma h + beta,  y = pool(relu(a))
//
// Rows r = 0 .. rows-1 are planes of height * width numbers; row r has weight gamma[r % channels].

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define SHUFFLES 1
#include "vectors.h"
#endif
#endif

namespace {

struct Bfloat16 {
    uint16_t bits;
};

inline float up(float x) { return x; }
inline double up(double x) { return x; }
inline float up(Bfloat16 x) {
    uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline void down(float x, float& to) { to = x; }
inline void down(double x, double& to) { to = x; }
inline void down(float x, Bfloat16& to) {  // to the nearest, ties to even; what is not a number stays none
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    to.bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

template <class T> struct Sum { using type = T; };
template <> struct Sum<Bfloat16> { using type = float; };

constexpr int64_t SMALL = 1 << 15;  // numbers below which waking other threads costs more than it brings
constexpr int64_t LARGEST = 128 * 128;  // numbers of a plane that find room on the stack

// Means of 2 x 2 numbers; an odd last row or column is dropped.
template <class A> inline void pool(const A* a, A* out, int64_t h, int64_t w) {
    const int64_t oh = h / 2, ow = w / 2;
#ifdef SHUFFLES
    typedef A Four __attribute__((vector_size(4 * sizeof(A))));
    if (w % 8 == 0) {
        for (int64_t i = 0; i < oh; ++i)
            for (int64_t j = 0; j < ow; j += 4) {
                Four p, q, r, s;
                std::memcpy(&p, a + 2 * i * w + 2 * j, sizeof p);
                std::memcpy(&q, a + 2 * i * w + 2 * j + 4, sizeof q);
                std::memcpy(&r, a + (2 * i + 1) * w + 2 * j, sizeof r);
                std::memcpy(&s, a + (2 * i + 1) * w + 2 * j + 4, sizeof s);
                p += r;
                q += s;
                Four y = A(0.25) * (__builtin_shufflevector(p, q, 0, 2, 4, 6) + __builtin_shufflevector(p, q, 1, 3, 5, 7));
                std::memcpy(out + i * ow + j, &y, sizeof y);
            }
        return;
    }
    if (h == 4 && w == 4) {
        Four p, q, r, s;
        std::memcpy(&p, a, sizeof p);
        std::memcpy(&q, a + 8, sizeof q);
        std::memcpy(&r, a + 4, sizeof r);
        std::memcpy(&s, a + 12, sizeof s);
        p += r;
        q += s;
        Four y = A(0.25) * (__builtin_shufflevector(p, q, 0, 2, 4, 6) + __builtin_shufflevector(p, q, 1, 3, 5, 7));
        std::memcpy(out, &y, sizeof y);
        return;
    }
#endif
    for (int64_t i = 0; i < oh; ++i)
        for (int64_t j = 0; j < ow; ++j) {
            const A* c = a + 2 * i * w + 2 * j;
            out[i * ow + j] = A(0.25) * ((c[0] + c[w]) + (c[1] + c[w + 1]));
        }
}

// Its transpose: a quarter of each number to the 2 x 2 that it is the mean of.
template <class A> inline void unpool(const A* g, A* u, int64_t h, int64_t w) {
    const int64_t oh = h / 2, ow = w / 2;
#ifdef SHUFFLES
    typedef A Four __attribute__((vector_size(4 * sizeof(A))));
    if (w % 8 == 0 && h % 2 == 0) {
        for (int64_t i = 0; i < oh; ++i)
            for (int64_t j = 0; j < ow; j += 4) {
                Four v;
                std::memcpy(&v, g + i * ow + j, sizeof v);
                v *= A(0.25);
                const Four p = __builtin_shufflevector(v, v, 0, 0, 1, 1), q = __builtin_shufflevector(v, v, 2, 2, 3, 3);
                A* c = u + 2 * i * w + 2 * j;
                std::memcpy(c, &p, sizeof p);
                std::memcpy(c + 4, &q, sizeof q);
                std::memcpy(c + w, &p, sizeof p);
                std::memcpy(c + w + 4, &q, sizeof q);
            }
        return;
    }
    if (h == 4 && w == 4) {
        Four v;
        std::memcpy(&v, g, sizeof v);
        v *= A(0.25);
        const Four p = __builtin_shufflevector(v, v, 0, 0, 1, 1), q = __builtin_shufflevector(v, v, 2, 2, 3, 3);
        std::memcpy(u, &p, sizeof p);
        std::memcpy(u + 4, &p, sizeof p);
        std::memcpy(u + 8, &q, sizeof q);
        std::memcpy(u + 12, &q, sizeof q);
        return;
    }
#endif
    for (int64_t i = 0; i < h * w; ++i) u[i] = 0;
    for (int64_t i = 0; i < oh; ++i)
        for (int64_t j = 0; j < ow; ++j) {
            const A v = A(0.25) * g[i * ow + j];
            A* c = u + 2 * i * w + 2 * j;
            c[0] = v; c[1] = v; c[w] = v; c[w + 1] = v;
        }
}

// Sizes known when this is compiled let the compiler lay the loops out; 0 is any size.
template <class T, int H, int W> struct Planes {
    using A = typename Sum<T>::type;
    static constexpr int64_t ROOM = H ? H * W : LARGEST, QUARTER = H ? (H / 2) * (W / 2) : LARGEST / 4;

    // Small planes are taken four at a time: what one waits for, the others do meanwhile. The last may be taken twice.
    static constexpr int TOGETHER = ROOM == 64 ? 4 : 1;

    static void forward(const T* z, const A* gamma, const A* beta, T* y, A* means, A* rstds, int64_t rows,
                        int64_t channels, int64_t height, int64_t width, double epsilon) {
        const int64_t h = H ? H : height, w = W ? W : width, n = h * w, pooled = (h / 2) * (w / 2);
#pragma omp parallel for if (rows * n > SMALL)
        for (int64_t first = 0; first < rows; first += TOGETHER) {
            A a[TOGETHER][ROOM], mean[TOGETHER], rstd[TOGETHER];
            int64_t r[TOGETHER];
            for (int k = 0; k < TOGETHER; ++k) {
                r[k] = std::min(first + k, rows - 1);
                const T* row = z + r[k] * n;
                A sum = 0;
#pragma GCC unroll 8
                for (int64_t i = 0; i < n; ++i) { a[k][i] = up(row[i]); sum += a[k][i]; }
                mean[k] = sum / n;
            }
            for (int k = 0; k < TOGETHER; ++k) {
                A square = 0;
#pragma GCC unroll 8
                for (int64_t i = 0; i < n; ++i) { const A d = a[k][i] - mean[k]; square += d * d; }
                rstd[k] = square / n + A(epsilon);
            }
            for (int k = 0; k < TOGETHER; ++k) rstd[k] = A(1) / std::sqrt(rstd[k]);
            for (int k = 0; k < TOGETHER; ++k) {
                const int64_t c = r[k] % channels;
                const A scale = gamma[c] * rstd[k], shift = beta[c] - mean[k] * scale;
#pragma GCC unroll 8
                for (int64_t i = 0; i < n; ++i) { const A v = a[k][i] * scale + shift; a[k][i] = v < 0 ? A(0) : v; }
                A small[QUARTER];
                pool(a[k], small, h, w);
                T* out = y + r[k] * pooled;
                for (int64_t i = 0; i < pooled; ++i) down(small[i], out[i]);
                means[r[k]] = mean[k];
                rstds[r[k]] = rstd[k];
            }
        }
    }

    // The pooled gradient spread over the plane, where the ReLU lets it through; the normalised plane beside it.
    static void spread(const T* g, const T* z, A gamma, A beta, A mean, A rstd, A* u, A* hat, int64_t h, int64_t w) {
        const int64_t n = h * w, pooled = (h / 2) * (w / 2);
        A small[QUARTER];
        for (int64_t i = 0; i < pooled; ++i) small[i] = up(g[i]);
        unpool(small, u, h, w);
#pragma GCC unroll 8
        for (int64_t i = 0; i < n; ++i) hat[i] = (up(z[i]) - mean) * rstd;
        // As in the forward pass, to the last bit: a mask that differs would be another function's.
        const A scale = gamma * rstd, shift = beta - mean * scale;
#pragma GCC unroll 8
        for (int64_t i = 0; i < n; ++i) u[i] = up(z[i]) * scale + shift > 0 ? u[i] : A(0);
    }

    static void backward(const T* g, const T* z, const A* gamma, const A* beta, const A* means, const A* rstds, T* gz,
                         A* ggamma, A* gbeta, int64_t rows, int64_t channels, int64_t height, int64_t width) {
        const int64_t h = H ? H : height, w = W ? W : width, n = h * w, pooled = (h / 2) * (w / 2);
#pragma omp parallel for if (rows * n > SMALL)
        for (int64_t r = 0; r < rows; ++r) {
            A u[ROOM], hat[ROOM];
            const A weight = gamma[r % channels], rstd = rstds[r];
            spread(g + r * pooled, z + r * n, weight, beta[r % channels], means[r], rstd, u, hat, h, w);
            A su = 0, suh = 0;
#pragma GCC unroll 8
            for (int64_t i = 0; i < n; ++i) { su += u[i]; suh += u[i] * hat[i]; }
            const A q = weight * rstd, mu = su / n, muh = suh / n;
            T* out = gz + r * n;
#pragma GCC unroll 8
            for (int64_t i = 0; i < n; ++i) down(q * (u[i] - mu - hat[i] * muh), out[i]);
            ggamma[r] = suh;
            gbeta[r] = su;
        }
    }

    // The derivative of S = <v, gz> + <vgamma, ggamma> + <vbeta, gbeta> in g, z and gamma (in beta it is nothing).
    static void twice(const T* v, const A* vgamma, const A* vbeta, const T* g, const T* z, const A* gamma,
                      const A* beta, const A* means, const A* rstds, T* sg, T* sz, A* sgamma, int64_t rows,
                      int64_t channels, int64_t height, int64_t width) {
        const int64_t h = H ? H : height, w = W ? W : width, n = h * w, pooled = (h / 2) * (w / 2);
#pragma omp parallel for if (rows * n > SMALL)
        for (int64_t r = 0; r < rows; ++r) {
            A u[ROOM], hat[ROOM], b[ROOM];
            const int64_t c = r % channels;
            const A weight = gamma[c], rstd = rstds[r], q = weight * rstd, vg = vgamma[c], vb = vbeta[c];
            const T* zr = z + r * n;
            const T* vr = v + r * n;
            spread(g + r * pooled, zr, weight, beta[c], means[r], rstd, u, hat, h, w);
            A su = 0, suh = 0, sv = 0, svh = 0, svu = 0;
            for (int64_t i = 0; i < n; ++i) {
                const A x = up(vr[i]);
                su += u[i]; suh += u[i] * hat[i]; sv += x; svh += x * hat[i]; svu += x * u[i];
            }
            const A mv = sv / n, mvh = svh / n, muh = suh / n;
            const A t = svu - sv * su / n - svh * suh / n;
            // In u, pulled through ReLU and pooling to g.
            const A scale = q, shift = beta[c] - means[r] * scale;
            for (int64_t i = 0; i < n; ++i) {
                const A in_u = q * (up(vr[i]) - mv - hat[i] * mvh) + vg * hat[i] + vb;
                b[i] = up(zr[i]) * scale + shift > 0 ? in_u : A(0);
            }
            A small[QUARTER];
            pool(b, small, h, w);
            T* out = sg + r * pooled;
            for (int64_t i = 0; i < pooled; ++i) down(small[i], out[i]);
            // In hat, then through hat and rstd to z.
            A sp = 0, sph = 0;
            for (int64_t i = 0; i < n; ++i) {
                const A p = vg * u[i] - q * (up(vr[i]) * muh + u[i] * mvh);
                b[i] = p; sp += p; sph += p * hat[i];
            }
            const A mp = sp / n, mph = sph / n + q * t / n;
            T* into = sz + r * n;
            for (int64_t i = 0; i < n; ++i) down(rstd * (b[i] - mp - hat[i] * mph), into[i]);
            sgamma[r] = rstd * t;
        }
    }
};

#ifdef SHUFFLES
// Planes of 4 x 4, eight at a time, one a lane of the vectors: no sum goes across one. Of the last eight some may be taken twice.
struct Fours {
    int64_t rows, channels;

    // f(row, its channel) for eight rows each.
    template <class F> void each(const F& f) const {
#pragma omp parallel for if (rows * 16 > SMALL)
        for (int64_t first = 0; first < rows; first += 8) {
            const int64_t row = std::min(first, rows - 8);
            f(row, row % channels);
        }
    }

    // What belongs to the channels of eight rows.
    INLINE Eight of(const float* numbers, int64_t channel) const {
        if (channel + 8 <= channels) return load<Eight>(numbers + channel);
        float found[8];
        for (int64_t l = 0; l < 8; ++l) found[l] = numbers[(channel + l) % channels];
        return load<Eight>(found);
    }

    void forward(const float* z, const float* gamma, const float* beta, float* y, float* means, float* rstds, float epsilon) const {
        each([&](int64_t row, int64_t channel) INLINED {
            Eight a[16], away[16], small[4];
            read_planes(z + 16 * row, 16, a);
            const Eight mean = 0.0625f * (added(a) + added(a + 8));
#pragma GCC unroll 16
            for (int i = 0; i < 16; ++i) away[i] = (a[i] - mean) * (a[i] - mean);
            const Eight rstd = one_over_root(0.0625f * (added(away) + added(away + 8)) + epsilon);
            const Eight scale = of(gamma, channel) * rstd, shift = of(beta, channel) - mean * scale;
#pragma GCC unroll 16
            for (int i = 0; i < 16; ++i) {
                const Eight v = a[i] * scale + shift;
                a[i] = v < 0.f ? Eight{} : v;
            }
#pragma GCC unroll 4
            for (int q = 0; q < 4; ++q) {
                const Eight* c = a + 8 * (q / 2) + 2 * (q % 2);
                small[q] = 0.25f * ((c[0] + c[4]) + (c[1] + c[5]));
            }
            Eight turned[4];
            transpose_halves(small, turned);
            store<Eight>(y + 4 * row, low_halves(turned[0], turned[1]));
            store<Eight>(y + 4 * row + 8, low_halves(turned[2], turned[3]));
            store<Eight>(y + 4 * row + 16, high_halves(turned[0], turned[1]));
            store<Eight>(y + 4 * row + 24, high_halves(turned[2], turned[3]));
            store<Eight>(means + row, mean);
            store<Eight>(rstds + row, rstd);
        });
    }

    void backward(const float* g, const float* z, const float* gamma, const float* beta, const float* means, const float* rstds,
                  float* gz, float* ggamma, float* gbeta) const {
        each([&](int64_t row, int64_t channel) INLINED {
            Eight hat[16], u[16], given[4], small[4], su{}, suh{};
            read_planes(z + 16 * row, 16, hat);
#pragma GCC unroll 2
            for (int h = 0; h < 2; ++h) {
                const Eight p = load<Eight>(g + 4 * row + 8 * h), q = load<Eight>(g + 4 * row + 16 + 8 * h);
                given[2 * h] = low_halves(p, q);
                given[2 * h + 1] = high_halves(p, q);
            }
            transpose_halves(given, small);
            const Eight mean = load<Eight>(means + row), rstd = load<Eight>(rstds + row);
            const Eight scale = of(gamma, channel) * rstd, shift = of(beta, channel) - mean * scale;
#pragma GCC unroll 16
            for (int i = 0; i < 16; ++i) {
                u[i] = hat[i] * scale + shift > 0.f ? 0.25f * small[i / 8 * 2 + i % 4 / 2] : Eight{};
                hat[i] = (hat[i] - mean) * rstd;
            }
#pragma GCC unroll 4
            for (int i = 0; i < 16; i += 4) {
                su += (u[i] + u[i + 1]) + (u[i + 2] + u[i + 3]);
                suh += (u[i] * hat[i] + u[i + 1] * hat[i + 1]) + (u[i + 2] * hat[i + 2] + u[i + 3] * hat[i + 3]);
            }
            const Eight mu = 0.0625f * su, muh = 0.0625f * suh;
#pragma GCC unroll 16
            for (int i = 0; i < 16; ++i) u[i] = scale * (u[i] - mu - hat[i] * muh);
            write_planes(u, 16, gz + 16 * row);
            store<Eight>(ggamma + row, suh);
            store<Eight>(gbeta + row, su);
        });
    }
};

template <>
void Planes<float, 4, 4>::forward(const float* z, const float* gamma, const float* beta, float* y, float* means, float* rstds,
                                  int64_t rows, int64_t channels, int64_t h, int64_t w, double epsilon) {
    if (rows < 8) Planes<float, 0, 0>::forward(z, gamma, beta, y, means, rstds, rows, channels, h, w, epsilon);
    else Fours{rows, channels}.forward(z, gamma, beta, y, means, rstds, static_cast<float>(epsilon));
}
template <>
void Planes<float, 4, 4>::backward(const float* g, const float* z, const float* gamma, const float* beta, const float* means,
                                   const float* rstds, float* gz, float* ggamma, float* gbeta, int64_t rows, int64_t channels,
                                   int64_t h, int64_t w) {
    if (rows < 8) Planes<float, 0, 0>::backward(g, z, gamma, beta, means, rstds, gz, ggamma, gbeta, rows, channels, h, w);
    else Fours{rows, channels}.backward(g, z, gamma, beta, means, rstds, gz, ggamma, gbeta);
}
#endif

// Rows of all images added up, channel by channel: however many channels stand beside one, in the same order.
template <class A> void added(const A* rows, A* total, int64_t images, int64_t channels) {
    constexpr int64_t PIECE = 64;
    for (int64_t first = 0; first < channels; first += PIECE) {
        const int64_t count = std::min(PIECE, channels - first);
        double sum[PIECE] = {};
        for (int64_t n = 0; n < images; ++n)
            for (int64_t c = 0; c < count; ++c) sum[c] += rows[n * channels + first + c];
        for (int64_t c = 0; c < count; ++c) total[first + c] = static_cast<A>(sum[c]);
    }
}

}  // namespace

#define SIZES(T, CALL)                                       \
    if (h == 4 && w == 4) return Planes<T, 4, 4>::CALL;      \
    if (h == 8 && w == 8) return Planes<T, 8, 8>::CALL;      \
    if (h == 16 && w == 16) return Planes<T, 16, 16>::CALL;  \
    if (h == 32 && w == 32) return Planes<T, 32, 32>::CALL;  \
    return Planes<T, 0, 0>::CALL;

#define EXPORT(NAME, T, A)                                                                                            \
    extern "C" void forward_##NAME(const T* z, const A* gamma, const A* beta, T* y, A* means, A* rstds, int64_t rows, \
                                   int64_t channels, int64_t h, int64_t w, double epsilon) {                          \
        SIZES(T, forward(z, gamma, beta, y, means, rstds, rows, channels, h, w, epsilon))                             \
    }                                                                                                                 \
    extern "C" void backward_##NAME(const T* g, const T* z, const A* gamma, const A* beta, const A* means,            \
                                    const A* rstds, T* gz, A* ggamma, A* gbeta, int64_t rows, int64_t channels,       \
                                    int64_t h, int64_t w) {                                                           \
        SIZES(T, backward(g, z, gamma, beta, means, rstds, gz, ggamma, gbeta, rows, channels, h, w))                  \
    }                                                                                                                 \
    extern "C" void twice_##NAME(const T* v, const A* vgamma, const A* vbeta, const T* g, const T* z, const A* gamma, \
                                 const A* beta, const A* means, const A* rstds, T* sg, T* sz, A* sgamma,              \
                                 int64_t rows, int64_t channels, int64_t h, int64_t w) {                              \
        SIZES(T, twice(v, vgamma, vbeta, g, z, gamma, beta, means, rstds, sg, sz, sgamma, rows, channels, h, w))      \
    }

extern "C" void added_float32(const float* rows, float* total, int64_t images, int64_t channels) {
    added(rows, total, images, channels);
}
extern "C" void added_float64(const double* rows, double* total, int64_t images, int64_t channels) {
    added(rows, total, images, channels);
}

EXPORT(float32, float, float)
EXPORT(float64, double, double)
EXPORT(bfloat16, Bfloat16, float)
