/* Linear layers and convolutions with sparse weights: y = W x + b, W as compressed rows.

   Zeros are neither stored nor multiplied. Columns of x are the dimension of the vectors: for each
   weight that is left, a whole row of x (samples, or positions of an image) is multiplied at once
   and added to a row of sums that stays in registers (Elsen et al., "Fast Sparse ConvNets",
   arXiv:1911.09723). Written with the vector extensions of gcc and clang, so that one source fits
   every processor; compiled for the one at hand by ops/native.py.

   O outputs, I inputs of a row, B samples, T columns of a panel. `ends`: O + 1 positions in
   `index` and `value`. The caller has checked that positions and indices are in range. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#define WIDEST 16
#elif defined(__AVX__)
#define WIDEST 8
#else
#define WIDEST 4
#endif
#define LESSER(a, b) ((a) < (b) ? (a) : (b))
#define UNROLL _Pragma("GCC unroll 8") for

/* NAME: T columns of y at once, for x whose row of weight j begins at index[j] * SCALE. Sums go in
   CHAINS interleaved chains, since an addition takes several cycles and must not wait for the one
   before. */
#define ROWS(NAME, T, CHAINS, INDEX, SCALE)                                                       \
    typedef float NAME##_vector __attribute__((vector_size(4 * LESSER(T, WIDEST)), aligned(4)));  \
    static void NAME(long O, const int32_t *ends, const INDEX *index, const float *value,         \
                     const float *bias, const float *x, float *y, long next)                      \
    {                                                                                             \
        enum { WIDTH = LESSER(T, WIDEST), VECTORS = (T) / WIDTH };                                \
        for (long o = 0; o < O; o++, y += next) {                                                 \
            NAME##_vector sum[CHAINS][VECTORS];                                                   \
            UNROLL(int c = 0; c < CHAINS; c++)                                                    \
                UNROLL(int k = 0; k < VECTORS; k++) sum[c][k] = (NAME##_vector){0};               \
            long j = ends[o], end = ends[o + 1];                                                  \
            for (; j + 4 <= end; j += 4) {                                                        \
                INDEX four[4];                                                                    \
                memcpy(four, index + j, sizeof four);                                             \
                UNROLL(int c = 0; c < 4; c++) {                                                   \
                    const float *row = x + (size_t)four[c] * (SCALE);                             \
                    UNROLL(int k = 0; k < VECTORS; k++) sum[c % CHAINS][k] +=                     \
                        value[j + c] * *(const NAME##_vector *)(row + k * WIDTH);                 \
                }                                                                                 \
            }                                                                                     \
            for (; j < end; j++) {                                                                \
                const float *row = x + (size_t)index[j] * (SCALE);                                \
                UNROLL(int k = 0; k < VECTORS; k++) sum[0][k] +=                                  \
                    value[j] * *(const NAME##_vector *)(row + k * WIDTH);                         \
            }                                                                                     \
            float start = bias ? bias[o] : 0;                                                     \
            UNROLL(int k = 0; k < VECTORS; k++) {                                                 \
                NAME##_vector all = sum[0][k] + start;                                            \
                UNROLL(int c = 1; c < CHAINS; c++) all += sum[c][k];                              \
                *(NAME##_vector *)(y + k * WIDTH) = all;                                          \
            }                                                                                     \
        }                                                                                         \
    }

ROWS(panel4, 4, 4, uint16_t, 4)
ROWS(panel8, 8, 4, uint16_t, 8)
ROWS(panel16, 16, 4, uint16_t, 16)
ROWS(panel32, 32, LESSER(4, WIDEST / 4), uint16_t, 32)
ROWS(image4, 4, 4, int32_t, 1)
ROWS(image8, 8, 4, int32_t, 1)
ROWS(image16, 16, 4, int32_t, 1)
ROWS(image32, 32, LESSER(4, WIDEST / 4), int32_t, 1)

#define ONE(NAME, INDEX)                                                                          \
    static void NAME(long O, const int32_t *ends, const INDEX *index, const float *value,         \
                     const float *bias, const float *x, float *y, long next)                      \
    {                                                                                             \
        for (long o = 0; o < O; o++, y += next) {                                                 \
            float sum[4] = {0};                                                                   \
            long j = ends[o], end = ends[o + 1];                                                  \
            for (; j + 4 <= end; j += 4)                                                          \
                UNROLL(int c = 0; c < 4; c++) sum[c] += value[j + c] * x[index[j + c]];           \
            for (; j < end; j++) sum[0] += value[j] * x[index[j]];                                \
            *y = ((sum[0] + sum[1]) + (sum[2] + sum[3])) + (bias ? bias[o] : 0);                  \
        }                                                                                         \
    }

ONE(sample1, uint16_t)
ONE(image1, int32_t)

/* to[c * T + r] = from[r * C + c] for R rows, of which to has T >= R: 4 x 4 numbers at a time. */
typedef float four __attribute__((vector_size(16), aligned(4)));
typedef int32_t pick __attribute__((vector_size(16)));
#if defined(__clang__)
#define MIX(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define MIX(a, b, ...) __builtin_shuffle(a, b, (pick){__VA_ARGS__})
#endif

static void transpose(const float *from, long R, long C, long step, float *to, long T)
{
    for (long c = 0; c < C; c += 4)
        for (long r = 0; r < R; r += 4) {
            if (c + 4 > C || r + 4 > R) {
                for (long i = c; i < LESSER(c + 4, C); i++)
                    for (long k = r; k < LESSER(r + 4, R); k++) to[i * T + k] = from[k * step + i];
                continue;
            }
            const float *at = from + r * step + c;
            four a0 = *(const four *)at, a1 = *(const four *)(at + step);
            four a2 = *(const four *)(at + 2 * step), a3 = *(const four *)(at + 3 * step);
            four b0 = MIX(a0, a1, 0, 4, 1, 5), b1 = MIX(a0, a1, 2, 6, 3, 7);
            four b2 = MIX(a2, a3, 0, 4, 1, 5), b3 = MIX(a2, a3, 2, 6, 3, 7);
            float *put = to + c * T + r;
            *(four *)put = MIX(b0, b2, 0, 1, 4, 5);
            *(four *)(put + T) = MIX(b0, b2, 2, 3, 6, 7);
            *(four *)(put + 2 * T) = MIX(b1, b3, 0, 1, 4, 5);
            *(four *)(put + 3 * T) = MIX(b1, b3, 2, 3, 6, 7);
        }
}

/* Memory that a thread keeps from call to call: asking the system again costs more than a layer. */
static float *room(size_t numbers)
{
    static _Thread_local float *kept;
    static _Thread_local size_t size;
    if (numbers > size) {
        free(kept);
        kept = malloc(numbers * sizeof(float));
        size = kept ? numbers : 0;
    }
    return kept;
}

/* x (B, I) -> y (B, O). Returns 0, or 1 where there is no memory. */
int tersor_sparse_linear(const float *x, long B, long I, long O, const int32_t *ends,
                         const uint16_t *index, const float *value, const float *bias, float *y)
{
    long widest = B > 16 ? 32 : B > 8 ? 16 : B > 4 ? 8 : 4;
    float *panel = B > 1 ? room((size_t)(I + O) * widest) : NULL;
    if (B > 1 && !panel) return 1;
    for (long b = 0; b < B;) {
        long left = B - b;
        if (left == 1) {
            sample1(O, ends, index, value, bias, x + b * I, y + b * O, 1);
            break;
        }
        long T = left > 16 ? 32 : left > 8 ? 16 : left > 4 ? 8 : 4, taken = LESSER(T, left);
        float *made = panel + I * T;
        if (taken < T) memset(panel, 0, sizeof(float) * I * T);
        transpose(x + b * I, taken, I, I, panel, T);
        if (T == 32) panel32(O, ends, index, value, bias, panel, made, T);
        else if (T == 16) panel16(O, ends, index, value, bias, panel, made, T);
        else if (T == 8) panel8(O, ends, index, value, bias, panel, made, T);
        else panel4(O, ends, index, value, bias, panel, made, T);
        transpose(made, O, taken, T, y + b * O, O);
        b += taken;
    }
    return 0;
}

/* Rows and columns, each: of the image, padded, of the kernel, its stride, padding, dilation. */
struct sizes {
    long in, out, kernel, stride, padding, dilation;
};

/* Positions of a phase's plane that one output row or column and its taps need. */
static long reach(struct sizes s) { return s.out + (s.kernel - 1) * s.dilation / s.stride; }

static int is_used(struct sizes s, long phase)
{
    for (long k = 0; k < s.kernel; k++)
        if (k * s.dilation % s.stride == phase) return 1;
    return 0;
}

/* Split a padded image into stride x stride planes: then all taps of a kernel are shifts by a
   constant, whatever the stride. */
static void split(const float *x, long C, struct sizes h, struct sizes w, float *planes)
{
    long rows = reach(h), columns = reach(w);
    for (long c = 0; c < C; c++, x += h.in * w.in)
        for (long a = 0; a < h.stride; a++)
            for (long b = 0; b < w.stride; b++, planes += rows * columns) {
                if (!is_used(h, a) || !is_used(w, b)) continue;
                for (long r = 0; r < rows; r++) {
                    long i = r * h.stride + a - h.padding;
                    float *put = planes + r * columns;
                    if (i < 0 || i >= h.in) {
                        memset(put, 0, columns * sizeof(float));
                        continue;
                    }
                    for (long s = 0; s < columns; s++) {
                        long k = s * w.stride + b - w.padding;
                        put[s] = k >= 0 && k < w.in ? x[i * w.in + k] : 0;
                    }
                }
            }
}

/* x (B, C, h.in, w.in) -> y (B, O, h.out, w.out); index counts taps: (channel, row, column).
   Returns 0, or 1 where there is no memory. */
int tersor_sparse_conv2d(const float *x, long B, long C, long O, const long *height,
                         const long *width, const int32_t *ends, const uint16_t *index,
                         const float *value, const float *bias, float *y)
{
    struct sizes h, w;
    memcpy(&h, height, sizeof h);
    memcpy(&w, width, sizeof w);
    long columns = reach(w), plane = reach(h) * columns, taps = h.kernel * w.kernel;
    long positions = (h.out - 1) * columns + w.out, phases = h.stride * w.stride;
    int as_is = taps == 1 && phases == 1 && !h.padding && !w.padding;
    long padded = as_is ? 0 : C * phases * plane;
    int strip = columns != w.out;
    long sums = strip ? O * positions : 0;
    /* int32_t is as large as float */
    float *image = room(padded + sums + C * taps + ends[O] + 1);
    if (!image) return 1;
    int32_t *shift = (int32_t *)(image + padded + sums);
    int32_t *offset = shift + C * taps;
    for (long t = 0; t < C * taps; t++) {
        long i = t / w.kernel % h.kernel * h.dilation, k = t % w.kernel * w.dilation;
        long at = (t / taps * h.stride + i % h.stride) * w.stride + k % w.stride;
        shift[t] = at * plane + i / h.stride * columns + k / w.stride;
    }
    for (long j = 0; j < ends[O]; j++) offset[j] = shift[index[j]];
    for (long b = 0; b < B; b++, x += C * h.in * w.in, y += O * h.out * w.out) {
        if (!as_is) split(x, C, h, w, image);
        const float *from = as_is ? x : image;
        float *made = strip ? image + padded : y;
        for (long p = 0; p < positions;) {
            long left = positions - p, T = left > 16 ? 32 : left > 8 ? 16 : left > 4 ? 8 : 4;
            while (T > positions) T = T > 4 ? T / 2 : 1;
            p = LESSER(p, positions - T); /* the last panel overlaps the one before */
            if (T == 32) image32(O, ends, offset, value, bias, from + p, made + p, positions);
            else if (T == 16) image16(O, ends, offset, value, bias, from + p, made + p, positions);
            else if (T == 8) image8(O, ends, offset, value, bias, from + p, made + p, positions);
            else if (T == 4) image4(O, ends, offset, value, bias, from + p, made + p, positions);
            else image1(O, ends, offset, value, bias, from + p, made + p, positions);
            p += T;
        }
        if (!strip) continue;
        for (long o = 0; o < O; o++)
            for (long r = 0; r < h.out; r++)
                for (long s = 0; s < w.out; s++)
                    y[(o * h.out + r) * w.out + s] = made[o * positions + r * columns + s];
    }
    return 0;
}
