/* The two hot places of DIN on a CPU: the first layer of its activation unit, and Dice.
 *
 * Compiled when first needed (see native.py), called through ctypes; the same functions written with torch stand beside
 * each call and the tests hold both equal. Vectors of 16 floats are lowered by the compiler to what the processor has.
 */
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef float vec __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(64), aligned(4), may_alias));
enum { W = 16, KEYS = 64 }; /* floats of a vector; keys of a history taken at a time */

#define LOAD(p) (*(const vec *)(p))
#define STORE(p, v) (*(vec *)(p) = (v))
#define INLINE static inline __attribute__((always_inline))

INLINE float total(vec x) {
    float sum = 0;
    for (int i = 0; i < W; i++) sum += x[i];
    return sum;
}

/* Impressions [*from, *to) of thread t: whole ones, about as many history values for each thread. */
static void share(int64_t num, const int64_t *offsets, int t, int threads, int64_t *from, int64_t *to) {
    int64_t low = offsets[num] * t / threads, high = offsets[num] * (t + 1) / threads, b = 0;
    while (b < num && offsets[b] < low) b++;
    *from = t ? b : 0;
    while (b < num && offsets[b] < high) b++;
    *to = t == threads - 1 ? num : b;
}

/* -------------------------------------------------------------------- first layer of the unit
 *
 * out[h] = query_part[b] + (Wk + Wp diag(q_b)) items[history[h]] for the values h of impression b. The matrix of an
 * impression is made once and stays in the cache: one matrix product instead of two, and no q * k in memory.
 * dim and hidden are multiples of 16. Weights are transposed: (dim, hidden), but for `wk`, `wp` of the backward pass.
 */
template <int V>
static void layer_forward(int64_t from, int64_t to, int64_t dim, const int64_t *offsets,
                          const int64_t *history, const float *items, const float *query, const float *query_part,
                          const float *wk_t, const float *wp_t, float *out) {
    constexpr int X = V <= 5 ? 4 : 2; /* keys at a time: their sums stay in registers */
    constexpr int64_t hidden = V * W;
    float *m = (float *)aligned_alloc(64, sizeof(float) * dim * hidden);
    for (int64_t b = from; b < to; b++) {
        const int64_t begin = offsets[b], end = offsets[b + 1];
        const float *q = query + b * dim, *own = query_part + b * hidden;
        if (begin == end) continue;
        for (int64_t i = 0; i < dim; i++)
            for (int v = 0; v < V; v++) {
                const int64_t at = i * hidden + v * W;
                STORE(m + at, LOAD(wk_t + at) + LOAD(wp_t + at) * q[i]);
            }
        for (int64_t h = begin; h < end; h += X) {
            const float *key[X];
            vec sum[X][V];
            for (int x = 0; x < X; x++) {
                key[x] = items + history[h + x < end ? h + x : end - 1] * dim;
                for (int v = 0; v < V; v++) sum[x][v] = LOAD(own + v * W);
            }
            for (int64_t i = 0; i < dim; i++)
                for (int v = 0; v < V; v++) {
                    const vec w = LOAD(m + i * hidden + v * W);
                    for (int x = 0; x < X; x++) sum[x][v] += w * key[x][i];
                }
            for (int x = 0; x < X && h + x < end; x++)
                for (int v = 0; v < V; v++) STORE(out + (h + x) * hidden + v * W, sum[x][v]);
        }
    }
    free(m);
}

/* d_weights: wk_t and wp_t of this thread, added to. */
template <int V>
static void layer_backward(int64_t from, int64_t to, int64_t dim, const int64_t *offsets,
                           const int64_t *history, const float *items, const float *query, const float *wk,
                           const float *wp, const float *wp_t, const float *grad, float *d_query, float *d_query_part,
                           float *d_keys, float *d_wk_t, float *d_wp_t) {
    constexpr int64_t hidden = V * W;
    float *m = (float *)aligned_alloc(64, sizeof(float) * dim * hidden); /* (hidden, dim) */
    float *keys = (float *)aligned_alloc(64, sizeof(float) * KEYS * dim);
    for (int64_t b = from; b < to; b++) {
        const float *q = query + b * dim;
        vec part[V];
        for (int v = 0; v < V; v++) part[v] = vec{};
        memset(d_query + b * dim, 0, sizeof(float) * dim);
        if (offsets[b] < offsets[b + 1])
            for (int64_t a = 0; a < hidden; a++)
                for (int64_t i = 0; i < dim; i += W)
                    STORE(m + a * dim + i, LOAD(wk + a * dim + i) + LOAD(wp + a * dim + i) * LOAD(q + i));
        for (int64_t begin = offsets[b]; begin < offsets[b + 1]; begin += KEYS) {
            const int64_t n = offsets[b + 1] - begin < KEYS ? offsets[b + 1] - begin : KEYS;
            const float *g = grad + begin * hidden;
            for (int64_t h = 0; h < n; h++) {
                memcpy(keys + h * dim, items + history[begin + h] * dim, sizeof(float) * dim);
                for (int v = 0; v < V; v++) part[v] += LOAD(g + h * hidden + v * W);
            }
            /* of the keys: 4 keys and 32 columns at a time */
            for (int64_t h = 0; h < n; h += 4) {
                const float *gh[4];
                for (int x = 0; x < 4; x++) gh[x] = g + (h + x < n ? h + x : n - 1) * hidden;
                int64_t i = 0;
                for (; i + 2 * W <= dim; i += 2 * W) {
                    vec sum[4][2];
                    for (int x = 0; x < 4; x++) sum[x][0] = sum[x][1] = vec{};
                    for (int64_t a = 0; a < hidden; a++) {
                        const vec w0 = LOAD(m + a * dim + i), w1 = LOAD(m + a * dim + i + W);
                        for (int x = 0; x < 4; x++) sum[x][0] += w0 * gh[x][a], sum[x][1] += w1 * gh[x][a];
                    }
                    for (int x = 0; x < 4 && h + x < n; x++)
                        for (int j = 0; j < 2; j++) STORE(d_keys + (begin + h + x) * dim + i + j * W, sum[x][j]);
                }
                for (; i < dim; i += W) {
                    vec sum[4];
                    for (int x = 0; x < 4; x++) sum[x] = vec{};
                    for (int64_t a = 0; a < hidden; a++)
                        for (int x = 0; x < 4; x++) sum[x] += LOAD(m + a * dim + i) * gh[x][a];
                    for (int x = 0; x < 4 && h + x < n; x++) STORE(d_keys + (begin + h + x) * dim + i, sum[x]);
                }
            }
            /* of the matrix, from which all weights and the query have theirs: J of its rows at a time */
            constexpr int J = V <= 5 ? 4 : 2;
            for (int64_t i = 0; i < dim; i += J) {
                vec sum[J][V];
                for (int j = 0; j < J; j++)
                    for (int v = 0; v < V; v++) sum[j][v] = vec{};
                for (int64_t h = 0; h < n; h++)
                    for (int v = 0; v < V; v++) {
                        const vec gv = LOAD(g + h * hidden + v * W);
                        for (int j = 0; j < J; j++) sum[j][v] += gv * keys[h * dim + i + j];
                    }
                for (int j = 0; j < J; j++) {
                    vec dot{};
                    for (int v = 0; v < V; v++) {
                        const int64_t at = (i + j) * hidden + v * W;
                        STORE(d_wk_t + at, LOAD(d_wk_t + at) + sum[j][v]);
                        STORE(d_wp_t + at, LOAD(d_wp_t + at) + sum[j][v] * q[i + j]);
                        dot += sum[j][v] * LOAD(wp_t + at);
                    }
                    d_query[b * dim + i + j] += total(dot);
                }
            }
        }
        for (int v = 0; v < V; v++) STORE(d_query_part + b * hidden + v * W, part[v]);
    }
    free(keys);
    free(m);
}

#define EACH_WIDTH(CALL) \
    switch (hidden / W) { \
        case 1: CALL(1); break; \
        case 2: CALL(2); break; \
        case 3: CALL(3); break; \
        case 4: CALL(4); break; \
        case 5: CALL(5); break; \
        case 6: CALL(6); break; \
        case 7: CALL(7); break; \
        default: CALL(8); \
    }

extern "C" void unit_forward(int threads, int64_t num, int64_t dim, int64_t hidden, const int64_t *offsets, const int64_t *history,
                  const float *items, const float *query, const float *query_part, const float *wk_t, const float *wp_t,
                  float *out) {
#pragma omp parallel num_threads(threads)
    {
        int64_t from, to;
        share(num, offsets, omp_get_thread_num(), omp_get_num_threads(), &from, &to);
#define CALL(V) layer_forward<V>(from, to, dim, offsets, history, items, query, query_part, wk_t, wp_t, out)
        EACH_WIDTH(CALL)
#undef CALL
    }
}

/* d_wk_t, d_wp_t: (threads, dim, hidden), zeros. */
extern "C" void unit_backward(int threads, int64_t num, int64_t dim, int64_t hidden, const int64_t *offsets,
                   const int64_t *history, const float *items, const float *query, const float *wk, const float *wp,
                   const float *wp_t, const float *grad, float *d_query, float *d_query_part, float *d_keys,
                   float *d_wk_t, float *d_wp_t) {
#pragma omp parallel num_threads(threads)
    {
        int64_t from, to, own = omp_get_thread_num() * dim * hidden;
        share(num, offsets, omp_get_thread_num(), omp_get_num_threads(), &from, &to);
#define CALL(V) \
    layer_backward<V>(from, to, dim, offsets, history, items, query, wk, wp, wp_t, grad, d_query, d_query_part, d_keys, \
                   d_wk_t + own, d_wp_t + own)
        EACH_WIDTH(CALL)
#undef CALL
    }
}

/* -------------------------------------------------------------------- Dice, rows (n, channels), channels <= 1024 */

/* 1 / (1 + exp(-x)); exp by a polynomial of Cephes, to 1e-7 of its value. NaN stays NaN. */
INLINE vec sigmoid(vec x) {
    vec y = -x;
    y = (y > 88.0f) ? vec{} + 88.0f : y;
    y = (y < -87.0f) ? vec{} - 87.0f : y;
    vec k = y * 1.44269504f;
    k = __builtin_convertvector(__builtin_convertvector(k + ((k > 0) ? vec{} + 0.5f : vec{} - 0.5f), ivec), vec);
    const vec r = y - k * 0.693359375f + k * 2.12194440e-4f;
    vec e = r * 1.9875691500e-4f + 1.3981999507e-3f;
    e = e * r + 8.3334519073e-3f;
    e = e * r + 4.1665795894e-2f;
    e = e * r + 1.6666665459e-1f;
    e = e * r + 5.0000001201e-1f;
    e = e * r * r + r + 1.0f;
    const ivec power = (__builtin_convertvector(k, ivec) + 127) << 23;
    const vec result = 1.0f / (1.0f + e * (vec)power);
    return (x == x) ? result : x;
}

/* Floats of a row that a vector at column c holds; the last one may hold fewer. */
INLINE int width(int64_t channels, int64_t c) { return channels - c < W ? (int)(channels - c) : W; }

INLINE vec take(const float *p, int n) {
    vec x{};
    if (n == W) return LOAD(p);
    memcpy(&x, p, sizeof(float) * n);
    return x;
}

INLINE void put(float *p, vec x, int n) {
    if (n == W) STORE(p, x);
    else memcpy(p, &x, sizeof(float) * n);
}

/* squares: (threads, channels), zeros. */
extern "C" void dice_squares(int threads, int64_t n, int64_t channels, const float *s, const float *mean, float *squares) {
#pragma omp parallel num_threads(threads)
    {
        const int t = omp_get_thread_num(), all = omp_get_num_threads();
        for (int64_t c = 0; c < channels; c += W) {
            const int w = width(channels, c);
            const vec m = take(mean + c, w);
            vec sum{};
            for (int64_t row = n * t / all; row < n * (t + 1) / all; row++) {
                const vec d = take(s + row * channels + c, w) - m;
                sum += d * d;
            }
            put(squares + t * channels + c, sum, w);
        }
    }
}

extern "C" void dice_forward(int threads, int64_t n, int64_t channels, const float *s, const float *mean, const float *r,
                  const float *alpha, float *out) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < n; row++)
        for (int64_t c = 0; c < channels; c += W) {
            const int w = width(channels, c);
            const vec x = take(s + row * channels + c, w), a = take(alpha + c, w);
            const vec p = sigmoid((x - take(mean + c, w)) * take(r + c, w));
            put(out + row * channels + c, x * (a + p * (1.0f - a)), w);
        }
}

/* What torch's version does in its first loop; sums: (threads, 4, channels), zeros. */
extern "C" void dice_backward(int threads, int64_t n, int64_t channels, const float *s, const float *grad, const float *mean,
                   const float *r, const float *alpha, float *out, float *sums) {
#pragma omp parallel num_threads(threads)
    {
        const int t = omp_get_thread_num(), all = omp_get_num_threads();
        for (int64_t c = 0; c < channels; c += W) {
            const int w = width(channels, c);
            const vec a = take(alpha + c, w), scale = take(r + c, w), middle = take(mean + c, w);
            vec sum[4] = {};
            for (int64_t row = n * t / all; row < n * (t + 1) / all; row++) {
                const int64_t at = row * channels + c;
                const vec x = take(s + at, w), g = take(grad + at, w);
                const vec u = (x - middle) * scale, p = sigmoid(u);
                const vec gx = g * x, gp = gx * p, d = gp - gp * p;
                sum[0] += gx, sum[1] += gp, sum[2] += d, sum[3] += d * u;
                put(out + at, g * (a + p * (1.0f - a)) + d * (1.0f - a) * scale, w);
            }
            for (int k = 0; k < 4; k++) put(sums + (t * 4 + k) * channels + c, sum[k], w);
        }
    }
}

/* out += (s - mean) * factor + constant */
extern "C" void dice_finish(int threads, int64_t n, int64_t channels, const float *s, const float *mean, const float *factor, const float *constant,
                 float *out) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < n; row++)
        for (int64_t c = 0; c < channels; c += W) {
            const int w = width(channels, c);
            const int64_t at = row * channels + c;
            put(out + at, take(out + at, w) + (take(s + at, w) - take(mean + c, w)) * take(factor + c, w) + take(constant + c, w), w);
        }
}
