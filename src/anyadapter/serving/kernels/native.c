/* The kernels for CPUs, in plain C with OpenMP and the vector types of GCC and Clang.
 *
 * Decoding reads every row once for one token, so it is as fast as memory if reads are asked for early enough: cells lie
 * scattered, the hardware does not foresee them, and each loop asks for the rows after those it works on. Numbers are fp32,
 * or bf16 widened by a shift; sums are fp32. Work is split by its amount, not by segment: ranks and lengths differ.
 * Segments of `least` tokens and more are left to the caller; the functions return how many there were.
 */
#include <omp.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#define ROWS 4    /* rows worked on together */
#define TOKENS 4  /* tokens they are reused for, while in registers */
#define BLOCK 256 /* columns of y in the making */
#define CELLS 16  /* keys scored before their values are added; a multiple of ROWS */
#define LINE 64
#define INLINE static inline __attribute__((always_inline))

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

INLINE long least_of(long a, long b) { return a < b ? a : b; }
INLINE long within(long a, long low, long high) { return a < low ? low : a > high ? high : a; }

/* LANES numbers at p. */
INLINE floats load(const char *p, int half)
{
    halves h;
    floats f;
    if (half) memcpy(&h, p, sizeof h);
    else memcpy(&f, p, sizeof f);
    return half ? (floats)(__builtin_convertvector(h, words) << 16) : f;
}

/* `count` < LANES numbers, and zeros. */
INLINE floats load_some(const char *p, long count, int half)
{
    char numbers[sizeof(floats)] = {0};
    memcpy(numbers, p, count * (half ? 2 : 4));
    return load(numbers, half);
}

INLINE float get(const char *p, long i, int half)
{
    if (!half) return ((const float *)p)[i];
    uint32_t word = (uint32_t)((const uint16_t *)p)[i] << 16;
    float f;
    memcpy(&f, &word, 4);
    return f;
}

/* Rounded to the nearest, ties to even. */
INLINE void put(char *p, long i, float f, int half)
{
    uint32_t word;
    memcpy(&word, &f, 4);
    if (!half) ((float *)p)[i] = f;
    else ((uint16_t *)p)[i] = f != f ? 0x7fc0 : (word + 0x7fff + ((word >> 16) & 1)) >> 16;
}

INLINE void fetch(const char *p, long bytes)
{
    for (long i = 0; i < bytes; i += LINE) __builtin_prefetch(p + i, 0, 2);
}

INLINE float total(floats f)
{
    float sum[LANES];
    memcpy(sum, &f, sizeof f);
    for (int step = LANES / 2; step; step /= 2)
        for (int i = 0; i < step; i++) sum[i] += sum[i + step];
    return sum[0];
}

/* sums[t][j] += x_t · row_j over `width` numbers, lane by lane. */
INLINE void multiply(floats sums[][ROWS], const char *const *x, int tokens, const char *const *row, long width, int half)
{
    long size = half ? 2 : 4, k = 0;
    floats a[ROWS], v;
    for (; k + LANES <= width; k += LANES) {
        for (int j = 0; j < ROWS; j++) a[j] = load(row[j] + k * size, half);
        for (int t = 0; t < tokens; t++) {
            v = load(x[t] + k * size, half);
            for (int j = 0; j < ROWS; j++) sums[t][j] += v * a[j];
        }
    }
    if (k == width) return;
    for (int j = 0; j < ROWS; j++) a[j] = load_some(row[j] + k * size, width - k, half);
    for (int t = 0; t < tokens; t++) {
        v = load_some(x[t] + k * size, width - k, half);
        for (int j = 0; j < ROWS; j++) sums[t][j] += v * a[j];
    }
}

/* sums[t][k] += factor[t][j] * b[j] in LANES columns; a line of `sums` is `stride` floats. */
INLINE void add(float *sums, long stride, const float factor[][ROWS], int tokens, const floats *b)
{
    for (int t = 0; t < tokens; t++) {
        floats sum;
        memcpy(&sum, sums + t * stride, sizeof sum);
        for (int j = 0; j < ROWS; j++) sum += factor[t][j] * b[j];
        memcpy(sums + t * stride, &sum, sizeof sum);
    }
}

/* sums[t] += factor[t][j] * row_j; `stride` is a multiple of LANES. */
INLINE void combine(float *sums, long stride, const float factor[][ROWS], int tokens, const char *const *row, long width,
                    int half)
{
    long size = half ? 2 : 4, k = 0;
    floats b[ROWS];
    for (; k + LANES <= width; k += LANES) {
        for (int j = 0; j < ROWS; j++) b[j] = load(row[j] + k * size, half);
        add(sums + k, stride, factor, tokens, b);
    }
    if (k == width) return;
    for (int j = 0; j < ROWS; j++) b[j] = load_some(row[j] + k * size, width - k, half);
    add(sums + k, stride, factor, tokens, b);
}

/* Run `call` with `count` as a constant, so that its loops are unrolled. */
#define UNROLLED(count, call) \
    switch (count) {          \
    case 1: call(1); break;   \
    case 2: call(2); break;   \
    case 3: call(3); break;   \
    default: call(4);         \
    }

/* Run `part` in each thread, with its number and how many there are. */
#define IN_THREADS(part)                                    \
    _Pragma("omp parallel num_threads(threads) if(threads > 1)") \
    {                                                       \
        int thread = omp_get_thread_num(), all = omp_get_num_threads(); \
        if (half) part(1);                                  \
        else part(0);                                       \
    }

typedef struct {
    long segments, chunks, cell, stride, least; /* a cell's numbers; bytes from one to the next */
    const int32_t *tokens, *rows, *hidden, *cells;
    const float *scale;
    const char *pool;
} Rows;

INLINE long left(const Rows *r)
{
    long count = 0;
    for (long s = 0; s < r->segments; s++)
        count += r->tokens[s + 1] - r->tokens[s] >= r->least && r->rows[s + 1] > r->rows[s];
    return count;
}

/* What one row costs: its bytes, and one product for each token. */
INLINE long cost(const Rows *r, long s)
{
    long tokens = r->tokens[s + 1] - r->tokens[s];
    return tokens && tokens < r->least ? 4 + tokens : 0;
}

INLINE long costs(const Rows *r)
{
    long sum = 0;
    for (long s = 0; s < r->segments; s++) sum += cost(r, s) * (r->rows[s + 1] - r->rows[s]);
    return sum;
}

/* The activations of `count` <= ROWS rows from `row`, for `tokens` tokens whose x begin at `x`. */
INLINE void activations(const Rows *r, long row, long count, const char *const *x, int tokens, long width, long ahead,
                        float *hidden, long stride, int half)
{
    floats sums[TOKENS][ROWS] = {0};
    long size = half ? 2 : 4;
    for (long c = 0, start = 0; start < width; c++, start += r->cell) {
        const char *at[ROWS], *part[TOKENS];
        long numbers = least_of(r->cell, width - start);
        for (int j = 0; j < ROWS; j++) at[j] = r->pool + r->cells[(row + least_of(j, count - 1)) * r->chunks + c] * r->stride;
        for (int t = 0; t < tokens; t++) part[t] = x[t] + start * size;
        for (long j = 0; j < ahead; j++)
            fetch(r->pool + r->cells[(row + count + j) * r->chunks + c] * r->stride, numbers * size);
        multiply(sums, part, tokens, at, numbers, half);
    }
    for (int t = 0; t < tokens; t++)
        for (int j = 0; j < count; j++) hidden[t * stride + j] = total(sums[t][j]);
}

INLINE void shrink_part(const Rows *r, const char *x, long x_stride, long width, float *hidden, int thread, int all, int half)
{
    long sum = costs(r), low = sum * thread / all, high = sum * (thread + 1) / all, seen = 0;
    for (long s = 0; s < r->segments; s++) {
        long unit = cost(r, s), rank = r->rows[s + 1] - r->rows[s], tokens = r->tokens[s + 1] - r->tokens[s];
        if (!unit || !rank) continue;
        long first = within((low - seen) / unit, 0, rank), last = within((high - seen) / unit, 0, rank);
        seen += unit * rank;
        for (long j = first; j < last; j += ROWS) {
            long count = least_of(ROWS, last - j), row = r->rows[s] + j;
            for (long t = 0; t < tokens; t += TOKENS) {
                const char *at[TOKENS];
                long ahead = t ? 0 : least_of(ROWS, r->rows[r->segments] - row - count);
                for (int i = 0; i < TOKENS; i++) at[i] = x + (r->tokens[s] + least_of(t + i, tokens - 1)) * x_stride;
#define CALL(n) activations(r, row, count, at, n, width, ahead, hidden + r->hidden[s] + t * rank + j, rank, half)
                UNROLLED(tokens - t, CALL)
#undef CALL
            }
        }
    }
}

long shrink(const Rows *r, const char *x, long x_stride, long width, float *hidden, int half, int threads)
{
#define PART(half) shrink_part(r, x, x_stride, width, hidden, thread, all, half)
    IN_THREADS(PART)
#undef PART
    return left(r);
}

/* Columns `start` to `stop` of one chunk of y for one segment. */
typedef struct {
    long s, start, stop, chunk;
} Piece;

/* The next `piece` of this thread; false when there is none. Begin with s = -1. */
INLINE int next(const Rows *r, Piece *p, long width, long low, long high, long *seen, long *last)
{
    long column = p->s < 0 ? 0 : p->stop;
    while (p->s < 0 || column >= *last) {
        if (p->s >= 0) *seen += cost(r, p->s) * (r->rows[p->s + 1] - r->rows[p->s]) * width;
        if (++p->s == r->segments) return 0;
        long unit = cost(r, p->s) * (r->rows[p->s + 1] - r->rows[p->s]);
        column = *last = 0;
        if (!unit) continue;
        /* Threads meet at a whole cache line. */
        column = low - *seen >= unit * width ? width : within((low - *seen) / unit, 0, width) / 32 * 32;
        *last = high - *seen >= unit * width ? width : within((high - *seen) / unit, 0, width) / 32 * 32;
    }
    p->chunk = column / r->cell;
    p->start = column;
    p->stop = least_of(least_of(*last, column + BLOCK), (p->chunk + 1) * r->cell);
    return 1;
}

/* Where the numbers of row `j` of the piece's segment begin. */
INLINE const char *piece_row(const Rows *r, const Piece *p, long j, long size)
{
    long cell = r->cells[(r->rows[p->s] + j) * r->chunks + p->chunk];
    return r->pool + cell * r->stride + (p->start - p->chunk * r->cell) * size;
}

INLINE void fetch_rows(const Rows *r, const Piece *p, long from, long size)
{
    long stop = least_of(from + ROWS, r->rows[p->s + 1] - r->rows[p->s]);
    for (long j = from; j < stop; j++) fetch(piece_row(r, p, j, size), (p->stop - p->start) * size);
}

/* `tokens` tokens of a piece; the rows of `following` are asked for at the end, if there is one. */
INLINE void expand_piece(const Rows *r, const Piece *p, const Piece *following, const float *hidden, char *y, long y_stride,
                         long token, int tokens, int half)
{
    long size = half ? 2 : 4, rank = r->rows[p->s + 1] - r->rows[p->s], width = p->stop - p->start;
    const float *scale = r->scale + r->rows[p->s], *h = hidden + r->hidden[p->s] + token * rank;
    float sums[TOKENS * BLOCK];
    for (int t = 0; t < tokens; t++)
        for (long k = 0; k < width; k++) sums[t * BLOCK + k] = -0.0f;
    int any = 0;
    for (long j = 0; j < rank; j += ROWS) {
        const char *row[ROWS];
        float factor[TOKENS][ROWS];
        if (!token && j + ROWS < rank) fetch_rows(r, p, j + ROWS, size);
        else if (!token && following) fetch_rows(r, following, 0, size);
        int used = 0;
        for (int i = 0; i < ROWS; i++) {
            long at = least_of(j + i, rank - 1);
            float strength = j + i < rank ? scale[at] : 0;
            used |= strength != 0;
            row[i] = piece_row(r, p, at, size);
            for (int t = 0; t < tokens; t++) factor[t][i] = strength != 0 ? strength * h[t * rank + at] : 0;
        }
        if (used) combine(sums, BLOCK, factor, tokens, row, width, half);
        any |= used;
    }
    if (!any) return;
    for (int t = 0; t < tokens; t++) {
        char *to = y + (r->tokens[p->s] + token + t) * y_stride + p->start * size;
        for (long k = 0; k < width; k++) put(to, k, get(to, k, half) + sums[t * BLOCK + k], half);
    }
}

INLINE void expand_part(const Rows *r, const float *hidden, char *y, long y_stride, long width, int thread, int all, int half)
{
    long sum = costs(r) * width, low = sum * thread / all, high = sum * (thread + 1) / all, seen = 0, last = 0;
    Piece piece, following = {.s = -1};
    int more = next(r, &following, width, low, high, &seen, &last);
    while (more) {
        piece = following;
        more = next(r, &following, width, low, high, &seen, &last);
        long tokens = r->tokens[piece.s + 1] - r->tokens[piece.s];
        for (long t = 0; t < tokens; t += TOKENS) {
#define CALL(n) expand_piece(r, &piece, more ? &following : 0, hidden, y, y_stride, t, n, half)
            UNROLLED(tokens - t, CALL)
#undef CALL
        }
    }
}

long expand(const Rows *r, const float *hidden, char *y, long y_stride, long width, int half, int threads)
{
#define PART(half) expand_part(r, hidden, y, y_stride, width, thread, all, half)
    IN_THREADS(PART)
#undef PART
    return left(r);
}

typedef struct {
    long segments, kv_heads, sharing, dim, stride, least, window; /* query heads to a key head; bytes of a cell; 0: none */
    const int32_t *tokens, *starts, *cells;
    const char *keys, *values;
    float scale, softcap; /* 0: none */
} Sequences;

#define LOG2E 1.44269504088896341f

/* 2^x: the whole part goes into the exponent, the rest (within 1/2 of 0) through its Taylor series. */
INLINE float power(float x)
{
    x = x < -126 ? -126 : x > 126 ? 126 : x;
    float whole = (x + 12582912.0f) - 12582912.0f; /* 1.5 * 2^23: rounds to an integer */
    float f = x - whole;
    float y = 1 + f * (0.693147181f + f * (0.240226507f + f * (0.0555041087f + f * (0.00961812911f +
              f * (0.00133335581f + f * 0.000154035304f)))));
    int32_t bits = ((int32_t)whole + 127) << 23;
    float scale;
    memcpy(&scale, &bits, 4);
    return y * scale;
}

/* Scores of CELLS keys, `count` of them real, become weights; `sums` and what was summed so far are rescaled. */
INLINE void soften(const Sequences *q, float *scores, long count, float *best, float *mass, float *sums, long dim)
{
    float top = *best, weight = 0;
    if (q->softcap)
        for (int i = 0; i < CELLS; i++)
            scores[i] = q->softcap * (1 - 2 / (1 + power(scores[i] * q->scale / q->softcap * 2 * LOG2E))) * LOG2E;
    else
        for (int i = 0; i < CELLS; i++) scores[i] *= q->scale * LOG2E;
    for (int i = 0; i < count; i++) top = scores[i] > top ? scores[i] : top;
    for (int i = 0; i < CELLS; i++) scores[i] = power(scores[i] - top);
    for (int i = count; i < CELLS; i++) scores[i] = 0;
    for (int i = 0; i < CELLS; i++) weight += scores[i];
    if (top > *best) {
        float old = power(*best - top);
        *mass *= old;
        for (long k = 0; k < dim; k++) sums[k] *= old;
        *best = top;
    }
    *mass += weight;
}

/* `sharing` query heads of one key head over CELLS cells, `count` of them real. */
INLINE void head_scores(const char *const *query, int tokens, const char *const *key, long dim, float *scores, int half)
{
    for (int i = 0; i < CELLS; i += ROWS) {
        floats sums[TOKENS][ROWS] = {0};
        multiply(sums, query, tokens, key + i, dim, half);
        for (int t = 0; t < tokens; t++)
            for (int j = 0; j < ROWS; j++) scores[t * CELLS + i + j] = total(sums[t][j]);
    }
}

INLINE void head_values(const float *scores, int tokens, const char *const *value, long dim, float *sums, long stride, int half)
{
    for (int i = 0; i < CELLS; i += ROWS) {
        float factor[TOKENS][ROWS];
        for (int t = 0; t < tokens; t++)
            for (int j = 0; j < ROWS; j++) factor[t][j] = scores[t * CELLS + i + j];
        combine(sums, stride, factor, tokens, value + i, dim, half);
    }
}

/* One token, key heads `first` to `last`: q and out begin at its first query head. */
INLINE void attend_token(const Sequences *s, const int32_t *cells, long count, const char *q, char *out, long first, long last,
                         int half)
{
    long size = half ? 2 : 4, dim = s->dim, padded = (dim + LANES - 1) / LANES * LANES;
    long heads = (last - first) * s->sharing, begin = first * dim * size, bytes = (last - first) * dim * size;
    float sums[heads * padded], best[heads], mass[heads], scores[heads * CELLS];
    memset(sums, 0, sizeof sums);
    memset(mass, 0, sizeof mass);
    for (long h = 0; h < heads; h++) best[h] = -1e30f;
    for (long at = 0; at < count; at += CELLS) {
        long real = least_of(CELLS, count - at);
        const char *key[CELLS], *value[CELLS];
        for (long i = 0; i < CELLS; i++) fetch(s->values + cells[at + least_of(i, real - 1)] * s->stride + begin, bytes);
        for (long head = 0; head < last - first; head++) {
            for (long i = 0; i < CELLS; i++)
                key[i] = s->keys + cells[at + least_of(i, real - 1)] * s->stride + begin + head * dim * size;
            for (long g = 0; g < s->sharing; g += TOKENS) {
                const char *query[TOKENS];
                for (long i = 0; i < TOKENS; i++)
                    query[i] = q + ((first + head) * s->sharing + least_of(g + i, s->sharing - 1)) * dim * size;
#define CALL(n) head_scores(query, n, key, dim, scores + (head * s->sharing + g) * CELLS, half)
                UNROLLED(s->sharing - g, CALL)
#undef CALL
            }
        }
        for (long h = 0; h < heads; h++) soften(s, scores + h * CELLS, real, best + h, mass + h, sums + h * padded, dim);
        for (long i = at + CELLS; i < least_of(count, at + 2 * CELLS); i++) fetch(s->keys + cells[i] * s->stride + begin, bytes);
        for (long head = 0; head < last - first; head++) {
            for (long i = 0; i < CELLS; i++)
                value[i] = s->values + cells[at + least_of(i, real - 1)] * s->stride + begin + head * dim * size;
            for (long g = 0; g < s->sharing; g += TOKENS) {
                long h = head * s->sharing + g;
#define CALL(n) head_values(scores + h * CELLS, n, value, dim, sums + h * padded, padded, half)
                UNROLLED(s->sharing - g, CALL)
#undef CALL
            }
        }
    }
    for (long h = 0; h < heads; h++)
        for (long k = 0; k < dim; k++)
            put(out + (first * s->sharing + h) * dim * size, k, sums[h * padded + k] / mass[h], half);
}

INLINE void attend_part(const Sequences *s, const char *q, long q_stride, char *out, int thread, int all, int half)
{
    long sum = 0, seen = 0, row = s->kv_heads * s->sharing * s->dim * (half ? 2 : 4);
#define NEW(i) (long)(s->tokens[i + 1] - s->tokens[i])
#define SEEN(i) (s->window ? least_of(s->window, s->starts[i + 1] - s->starts[i]) : s->starts[i + 1] - s->starts[i])
#define COST(i) (NEW(i) < s->least ? SEEN(i) : 0)
    for (long i = 0; i < s->segments; i++) sum += COST(i) * NEW(i) * s->kv_heads;
    long low = sum * thread / all, high = sum * (thread + 1) / all;
    for (long i = 0; i < s->segments; i++) {
        long unit = COST(i), units = NEW(i) * s->kv_heads, n = NEW(i), cells = s->starts[i + 1] - s->starts[i];
        if (!unit) continue;
        long u = within((low - seen + unit / 2) / unit, 0, units), stop = within((high - seen + unit / 2) / unit, 0, units);
        seen += unit * units;
        while (u < stop) {
            long t = u / s->kv_heads, first = u % s->kv_heads, last = least_of(s->kv_heads, first + stop - u);
            long visible = cells - n + t + 1, skip = s->window && visible > s->window ? visible - s->window : 0;
            attend_token(s, s->cells + s->starts[i] + skip, visible - skip, q + (s->tokens[i] + t) * q_stride,
                         out + (s->tokens[i] + t) * row, first, last, half);
            u += last - first;
        }
    }
}

void attend(const Sequences *s, const char *q, long q_stride, char *out, int half, int threads)
{
#define PART(half) attend_part(s, q, q_stride, out, thread, all, half)
    IN_THREADS(PART)
#undef PART
}
