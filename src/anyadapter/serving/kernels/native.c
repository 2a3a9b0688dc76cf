/* The kernels for CPUs, in plain C with OpenMP and the vector types of GCC and Clang.
 *
 * Decoding reads every row once for one token, so it is as fast as memory if reads are asked for early enough: cells lie
 * scattered, the hardware does not foresee them, and each loop asks for the rows after those it works on. Numbers are fp32,
 * or bf16 widened by a shift, or one bit that chooses between a row's two levels; sums are fp32. Work is split by its amount,
 * not by segment: ranks and lengths differ.
 * Sequences of `least` new tokens and more are left to the caller, whose BLAS does better there.
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
#define AHEAD 16  /* cells asked for before they are needed; of scattered ones, half as many give 3/4 of the speed */
#define LINE 64
#define STEP (4 * LANES) /* bytes in a vector */
#define INLINE static inline __attribute__((always_inline))

typedef float floats __attribute__((vector_size(STEP)));
typedef uint32_t words __attribute__((vector_size(STEP)));

/* A vector of bf16 is worked on as two of fp32, its even and its odd numbers: one shift and one mask. */
#define PARTS (half ? 2 : 1)
#define SIZE (half ? 2 : 4)

INLINE long least_of(long a, long b) { return a < b ? a : b; }
INLINE long within(long a, long low, long high) { return a < low ? low : a > high ? high : a; }

/* One part of the vector at p. */
INLINE floats load(const char *p, int part, int half)
{
    words w;
    memcpy(&w, p, STEP);
    return (floats)(!half ? w : part ? w & 0xffff0000 : w << 16);
}

/* The upper 16 bits of each number, rounded to nearest, ties to even. */
INLINE words rounded(floats f)
{
    words w = (words)f, nan = (words)(f != f);
    return (nan & 0x7fc00000) | (~nan & (w + 0x7fff + ((w >> 16) & 1)) & 0xffff0000);
}

INLINE void store(char *p, const floats *parts, int half)
{
    words w = half ? rounded(parts[0]) >> 16 | rounded(parts[1]) : (words)parts[0];
    memcpy(p, &w, STEP);
}

INLINE void fetch(const char *p, long bytes)
{
    for (long i = 0; i < bytes; i += LINE) __builtin_prefetch(p + i, 0, 2);
}

INLINE float total(floats f)
{
    typedef float four __attribute__((vector_size(16)));
    four quarters[LANES / 4];
    memcpy(quarters, &f, STEP);
    for (int i = 1; i < LANES / 4; i++) quarters[0] += quarters[i];
    return (quarters[0][0] + quarters[0][1]) + (quarters[0][2] + quarters[0][3]);
}

/* What the bits of a row mean. */
typedef struct {
    float low, high;
} Level;

/* One part of the vector of a row: of its numbers, or of the levels its bits choose; `at` counts bytes of numbers. */
INLINE floats load_row(const char *row, const Level *level, long at, int part, int half)
{
    if (!level) return load(row + at, part, half);
    uint32_t word;
    words bit;
    memcpy(&word, row + at / SIZE / 32 * 4, 4);
    for (int i = 0; i < LANES; i++) bit[i] = 1u << (half ? 2 * i + part : i);
    words high = (words)(((word >> at / SIZE % 32) & bit) != 0);
    floats choice[2] = {level->low - (floats){0}, level->high - (floats){0}};
    return (floats)((high & (words)choice[1]) | (~high & (words)choice[0]));
}

/* sums[t][j] += x_t · row_j in one vector, lane by lane; `level` is null for rows of numbers. */
INLINE void multiply_step(floats sums[][ROWS], const char *const *x, long x_at, int tokens, const char *const *row,
                          const Level *level, long at, int half)
{
    for (int part = 0; part < PARTS; part++) {
        floats a[ROWS];
        for (int j = 0; j < ROWS; j++) a[j] = load_row(row[j], level ? level + j : 0, at, part, half);
        for (int t = 0; t < tokens; t++) {
            floats v = load(x[t] + x_at, part, half);
            for (int j = 0; j < ROWS; j++) sums[t][j] += v * a[j];
        }
    }
}

/* The vector at p; of one that has only `bytes` bytes left, those, filled up with zeros in `spare`. */
INLINE const char *filled(char *spare, const char *p, long bytes)
{
    if (bytes >= STEP) return p;
    memset(spare, 0, STEP);
    return memcpy(spare, p, bytes);
}

/* That of each of `count` rows. */
INLINE void pad(char (*to)[STEP], const char **pointers, const char *const *row, int count, long at, long bytes)
{
    for (int j = 0; j < count; j++) pointers[j] = filled(to[j], row[j] + at, bytes);
}

/* The same over `bytes` bytes of x. Bits come in whole words, of which the last ones meet zeros. */
INLINE void multiply(floats sums[][ROWS], const char *const *x, int tokens, const char *const *row, const Level *level,
                     long bytes, int half)
{
    long at = 0;
    for (; at + STEP <= bytes; at += STEP) multiply_step(sums, x, at, tokens, row, level, at, half);
    if (at == bytes) return;
    char ends[ROWS][STEP], x_ends[TOKENS][STEP];
    const char *end[ROWS], *x_end[TOKENS];
    pad(x_ends, x_end, x, tokens, at, bytes - at);
    if (!level) pad(ends, end, row, ROWS, at, bytes - at);
    multiply_step(sums, x_end, 0, tokens, level ? row : end, level, level ? at : 0, half);
}

/* sums[t] += factor[t][j] * row_j in one vector. A line of `sums` has its numbers part by part, as `load` gives them. */
INLINE void combine_step(float *sums, long line, const float factor[][ROWS], int tokens, const char *const *row,
                         const Level *level, long at, int half)
{
    for (int part = 0; part < PARTS; part++) {
        floats b[ROWS];
        for (int j = 0; j < ROWS; j++) b[j] = load_row(row[j], level ? level + j : 0, at, part, half);
        for (int t = 0; t < tokens; t++) {
            floats sum;
            memcpy(&sum, sums + t * line + part * LANES, STEP);
            for (int j = 0; j < ROWS; j++) sum += factor[t][j] * b[j];
            memcpy(sums + t * line + part * LANES, &sum, STEP);
        }
    }
}

/* The same over `bytes` bytes of y; `line` floats hold as many numbers, in whole vectors. */
INLINE void combine(float *sums, long line, const float factor[][ROWS], int tokens, const char *const *row, const Level *level,
                    long bytes, int half)
{
    long at = 0;
    for (; at + STEP <= bytes; at += STEP) combine_step(sums + at / SIZE, line, factor, tokens, row, level, at, half);
    if (at == bytes) return;
    char ends[ROWS][STEP];
    const char *end[ROWS];
    if (!level) pad(ends, end, row, ROWS, at, bytes - at);
    combine_step(sums + at / SIZE, line, factor, tokens, level ? row : end, level, level ? at : 0, half);
}

/* to = keep * to + scale * sums, over `bytes` bytes; what is not kept is not read. */
INLINE void finish(char *to, const float *sums, float scale, int keep, long bytes, int half)
{
    for (long at = 0; at < bytes; at += STEP) {
        char vector[STEP] = {0}, *p = at + STEP <= bytes ? to + at : vector;
        floats parts[2];
        if (p == vector && keep) memcpy(vector, to + at, bytes - at);
        for (int part = 0; part < PARTS; part++) {
            memcpy(&parts[part], sums + at / SIZE + part * LANES, STEP);
            parts[part] = keep ? load(p, part, half) + parts[part] * scale : parts[part] * scale;
        }
        store(p, parts, half);
        if (p == vector) memcpy(to + at, vector, bytes - at);
    }
}

/* to = weight * x / sqrt(mean(x^2) + eps); x is rounded to its own type before the weight, as the models do. */
INLINE void normalise(const char *x, const char *weight, long bytes, float eps, char *to, int half)
{
    char spare[STEP], other[STEP], end[STEP];
    floats squares = {0}, parts[2];
    for (long at = 0; at < bytes; at += STEP)
        for (int part = 0; part < PARTS; part++) {
            floats v = load(filled(spare, x + at, bytes - at), part, half);
            squares += v * v;
        }
    float factor = 1 / __builtin_sqrtf(total(squares) * SIZE / bytes + eps);
    for (long at = 0; at < bytes; at += STEP) {
        const char *v = filled(spare, x + at, bytes - at), *w = filled(other, weight + at, bytes - at);
        for (int part = 0; part < PARTS; part++) {
            parts[part] = load(v, part, half) * factor;
            if (half) parts[part] = (floats)rounded(parts[part]);
            parts[part] *= load(w, part, half);
        }
        store(bytes - at < STEP ? end : to + at, parts, half);
        if (bytes - at < STEP) memcpy(to + at, end, bytes - at);
    }
}

/* Run `call` with `count` as a constant, so that its loops are unrolled. */
#define UNROLLED(count, call) \
    switch (count) {          \
    case 1: call(1); break;   \
    case 2: call(2); break;   \
    case 3: call(3); break;   \
    default: call(4);         \
    }

/* Run `part` in each thread, with its number and how many there are; `half` and `bits` become constants. */
#define IN_THREADS(bits, part)                              \
    _Pragma("omp parallel num_threads(threads) if(threads > 1)") \
    {                                                       \
        int thread = omp_get_thread_num(), all = omp_get_num_threads(); \
        if (half && bits) part(1, 1);                       \
        else if (half) part(1, 0);                          \
        else if (bits) part(0, 1);                          \
        else part(0, 0);                                    \
    }

typedef struct {
    long segments, chunks, cell, stride; /* a cell's numbers; bytes from one to the next */
    const int32_t *tokens, *rows, *hidden, *cells, *offsets; /* where in its cell a row of bits begins; null: of numbers */
    const float *scale;
    const int64_t *levels; /* where in the pool they are, of bits */
    const char *pool;
} Rows;

/* What one row costs: its bytes, and one product for each token. */
INLINE long cost(const Rows *r, long s)
{
    long tokens = r->tokens[s + 1] - r->tokens[s];
    return tokens ? 4 + tokens : 0;
}

INLINE long costs(const Rows *r)
{
    long sum = 0;
    for (long s = 0; s < r->segments; s++) sum += cost(r, s) * (r->rows[s + 1] - r->rows[s]);
    return sum;
}

/* Where chunk `c` of a row is. */
INLINE const char *cell(const Rows *r, long row, long c, int bits)
{
    return r->pool + r->cells[row * r->chunks + c] * r->stride + (bits ? r->offsets[row] : 0);
}

INLINE Level level_of(const Rows *r, long row)
{
    Level level;
    memcpy(&level, r->pool + r->levels[row], sizeof level);
    return level;
}

/* The bytes of so many numbers of a row. */
INLINE long bytes_of(long numbers, int half, int bits) { return bits ? (numbers + 31) / 32 * 4 : numbers * SIZE; }

/* The activations of `count` <= ROWS rows from `row` on, for `tokens` tokens; `count` rows from `ahead` on are asked for. */
INLINE void activations(const Rows *r, long row, long count, long ahead, const char *const *x, int tokens, long width,
                        float *hidden, long line, int half, int bits)
{
    floats sums[TOKENS][ROWS] = {0};
    long stop = least_of(ahead + count, r->rows[r->segments]);
    for (long c = 0, start = 0; start < width; c++, start += r->cell) {
        const char *at[ROWS], *part[TOKENS];
        Level level[ROWS];
        long numbers = least_of(r->cell, width - start);
        for (int j = 0; j < ROWS; j++) at[j] = cell(r, row + least_of(j, count - 1), c, bits);
        for (int j = 0; j < ROWS && bits; j++) level[j] = level_of(r, row + least_of(j, count - 1));
        for (int t = 0; t < tokens; t++) part[t] = x[t] + start * SIZE;
        for (long j = ahead; j < stop; j++) fetch(cell(r, j, c, bits), bytes_of(numbers, half, bits));
        multiply(sums, part, tokens, at, bits ? level : 0, numbers * SIZE, half);
    }
    for (int t = 0; t < tokens; t++)
        for (int j = 0; j < count; j++) hidden[t * line + j] = total(sums[t][j]);
}

INLINE void shrink_part(const Rows *r, const char *x, long x_stride, long width, float *hidden, int thread, int all, int half,
                        int bits)
{
    long sum = costs(r), low = sum * thread / all, high = sum * (thread + 1) / all, seen = 0;
    long ahead = ROWS * ((AHEAD + ROWS * r->chunks - 1) / (ROWS * r->chunks));
    for (long s = 0; s < r->segments; s++) {
        long unit = cost(r, s), rank = r->rows[s + 1] - r->rows[s], tokens = r->tokens[s + 1] - r->tokens[s];
        if (!unit || !rank) continue;
        long first = within((low - seen) / unit, 0, rank), last = within((high - seen) / unit, 0, rank);
        seen += unit * rank;
        for (long j = first; j < last; j += ROWS) {
            long count = least_of(ROWS, last - j), row = r->rows[s] + j;
            for (long t = 0; t < tokens; t += TOKENS) {
                const char *at[TOKENS];
                long next = t ? r->rows[r->segments] : row + ahead;
                for (int i = 0; i < TOKENS; i++) at[i] = x + (r->tokens[s] + least_of(t + i, tokens - 1)) * x_stride;
#define CALL(n) activations(r, row, count, next, at, n, width, hidden + r->hidden[s] + t * rank + j, rank, half, bits)
                UNROLLED(tokens - t, CALL)
#undef CALL
            }
        }
    }
}

void shrink(const Rows *r, const char *x, long x_stride, long width, float *hidden, int half, int threads)
{
#define PART(half, bits) shrink_part(r, x, x_stride, width, hidden, thread, all, half, bits)
    IN_THREADS(r->offsets, PART)
#undef PART
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

/* A thread's way through its pieces, row by row. */
typedef struct {
    Piece piece;
    long row, low, high, seen, last;
    int more;
} Walk;

INLINE void start(const Rows *r, Walk *w, long width, int thread, int all)
{
    long sum = costs(r) * width;
    *w = (Walk){.piece = {.s = -1}, .low = sum * thread / all, .high = sum * (thread + 1) / all};
    w->more = next(r, &w->piece, width, w->low, w->high, &w->seen, &w->last);
}

/* Where the numbers of row `j` of the piece begin. */
INLINE const char *piece_row(const Rows *r, const Piece *p, long j, int half, int bits)
{
    return cell(r, r->rows[p->s] + j, p->chunk, bits) + bytes_of(p->start - p->chunk * r->cell, half, bits);
}

/* Ask for the next `count` rows. */
INLINE void fetch_rows(const Rows *r, Walk *w, long width, long count, int half, int bits)
{
    for (; count && w->more; count--) {
        fetch(piece_row(r, &w->piece, w->row, half, bits), bytes_of(w->piece.stop - w->piece.start, half, bits));
        if (++w->row < r->rows[w->piece.s + 1] - r->rows[w->piece.s]) continue;
        w->row = 0;
        w->more = next(r, &w->piece, width, w->low, w->high, &w->seen, &w->last);
    }
}

/* `tokens` tokens of a piece, from `token` on. Rows of scale 0 are skipped, so that y stays as it is to the bit. */
INLINE void expand_piece(const Rows *r, const Piece *p, Walk *ahead, long width, const float *hidden, char *y, long y_stride,
                         long token, int tokens, int half, int bits)
{
    long rank = r->rows[p->s + 1] - r->rows[p->s], bytes = (p->stop - p->start) * SIZE;
    const float *scale = r->scale + r->rows[p->s], *h = hidden + r->hidden[p->s] + token * rank;
    float sums[TOKENS * BLOCK];
    memset(sums, 0, tokens * BLOCK * sizeof(float));
    int any = 0;
    for (long j = 0; j < rank; j += ROWS) {
        const char *row[ROWS];
        Level level[ROWS];
        float factor[TOKENS][ROWS];
        int used = 0;
        if (!token) fetch_rows(r, ahead, width, least_of(ROWS, rank - j), half, bits);
        for (int i = 0; i < ROWS; i++) {
            long at = least_of(j + i, rank - 1);
            float strength = j + i < rank ? scale[at] : 0;
            used |= strength != 0;
            row[i] = piece_row(r, p, at, half, bits);
            if (bits) level[i] = level_of(r, r->rows[p->s] + at);
            for (int t = 0; t < tokens; t++) factor[t][i] = strength != 0 ? strength * h[t * rank + at] : 0;
        }
        if (used) combine(sums, BLOCK, factor, tokens, row, bits ? level : 0, bytes, half);
        any |= used;
    }
    if (!any) return;
    for (int t = 0; t < tokens; t++)
        finish(y + (r->tokens[p->s] + token + t) * y_stride + p->start * SIZE, sums + t * BLOCK, 1, 1, bytes, half);
}

INLINE void expand_part(const Rows *r, const float *hidden, char *y, long y_stride, long width, int thread, int all, int half,
                        int bits)
{
    Walk walk, ahead;
    start(r, &walk, width, thread, all);
    ahead = walk;
    fetch_rows(r, &ahead, width, AHEAD, half, bits);
    for (; walk.more; walk.more = next(r, &walk.piece, width, walk.low, walk.high, &walk.seen, &walk.last)) {
        long tokens = r->tokens[walk.piece.s + 1] - r->tokens[walk.piece.s];
        for (long t = 0; t < tokens; t += TOKENS) {
#define CALL(n) expand_piece(r, &walk.piece, &ahead, width, hidden, y, y_stride, t, n, half, bits)
            UNROLLED(tokens - t, CALL)
#undef CALL
        }
    }
}

void expand(const Rows *r, const float *hidden, char *y, long y_stride, long width, int half, int threads)
{
#define PART(half, bits) expand_part(r, hidden, y, y_stride, width, thread, all, half, bits)
    IN_THREADS(r->offsets, PART)
#undef PART
}

/* Both, one after the other: y += rows of `up` times (rows of `down` times x), both of bits or neither. Threads meet once
 * in between. */
void add(const Rows *down, const Rows *up, const char *down_pool, const char *up_pool, const char *x, long x_stride,
         long x_width, float *hidden, char *y, long y_stride, long y_width, int half, int threads)
{
    Rows first = *down, second = *up;
    first.pool = down_pool, second.pool = up_pool;
#define PART(half, bits)                                                        \
    do {                                                                        \
        shrink_part(&first, x, x_stride, x_width, hidden, thread, all, half, bits); \
        _Pragma("omp barrier")                                                  \
        expand_part(&second, hidden, y, y_stride, y_width, thread, all, half, bits); \
    } while (0)
    IN_THREADS(first.offsets, PART)
#undef PART
}

typedef struct {
    long segments, kv_heads, sharing, dim, stride, least, window; /* query heads to a key head; bytes of a cell; 0: none */
    const int32_t *tokens, *starts, *cells;
    const char *keys, *values;
    float scale, softcap; /* 0: none */
} Sequences;

#define LOG2E 1.44269504088896341f
#define NONE -1e30f /* less than any score */

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

INLINE float folded(const float *numbers, int largest)
{
    float fold[CELLS];
    memcpy(fold, numbers, sizeof fold);
    for (int step = CELLS / 2; step; step /= 2)
        for (int i = 0; i < step; i++)
            fold[i] = !largest ? fold[i] + fold[i + step] : fold[i + step] > fold[i] ? fold[i + step] : fold[i];
    return fold[0];
}

/* Scores of CELLS keys, `count` of them real, become weights; `sums` and `mass`, of the keys before, are scaled to match. */
INLINE void soften(const Sequences *q, float *scores, long count, float *best, float *mass, float *sums, long line)
{
    if (q->softcap)
        for (int i = 0; i < CELLS; i++)
            scores[i] = q->softcap * (1 - 2 / (1 + power(scores[i] * q->scale / q->softcap * 2 * LOG2E))) * LOG2E;
    else
        for (int i = 0; i < CELLS; i++) scores[i] *= q->scale * LOG2E;
    for (long i = count; i < CELLS; i++) scores[i] = NONE;
    float top = folded(scores, 1);
    if (top > *best) {
        float old = power(*best - top);
        *mass *= old;
        for (long k = 0; k < line; k++) sums[k] *= old;
        *best = top;
    }
    for (int i = 0; i < CELLS; i++) scores[i] = power(scores[i] - *best);
    for (long i = count; i < CELLS; i++) scores[i] = 0;
    *mass += folded(scores, 0);
}

/* Scores of CELLS keys for `heads` query heads that share them; their values are asked for. */
INLINE void score(const char *const *query, int heads, const char *const *key, const char *const *value, long bytes,
                  float *scores, int half)
{
    for (int i = 0; i < CELLS; i += ROWS) {
        floats sums[TOKENS][ROWS] = {0};
        for (int j = 0; j < ROWS; j++) fetch(value[i + j], bytes);
        multiply(sums, query, heads, key + i, 0, bytes, half);
        for (int t = 0; t < heads; t++)
            for (int j = 0; j < ROWS; j++) scores[t * CELLS + i + j] = total(sums[t][j]);
    }
}

/* Add the values, weighted; the keys after them are asked for. */
INLINE void weigh(const float *scores, int heads, const char *const *value, const char *const *after, long bytes, float *sums,
                  long line, int half)
{
    for (int i = 0; i < CELLS; i += ROWS) {
        float factor[TOKENS][ROWS];
        for (int j = 0; j < ROWS; j++) fetch(after[i + j], bytes);
        for (int t = 0; t < heads; t++)
            for (int j = 0; j < ROWS; j++) factor[t][j] = scores[t * CELLS + i + j];
        combine(sums, line, factor, heads, value + i, 0, bytes, half);
    }
}

/* One token, key heads `first` to `last`; q and out begin at its head 0. Keys and values are read once, block by block. */
INLINE void attend_token(const Sequences *s, const int32_t *cells, long count, const char *q, char *out, long first, long last,
                         int half)
{
    long bytes = s->dim * SIZE, line = (bytes + STEP - 1) / STEP * STEP / SIZE, heads = (last - first) * s->sharing;
    float sums[heads * line], best[heads], mass[heads], scores[heads * CELLS];
    memset(sums, 0, sizeof sums);
    memset(mass, 0, sizeof mass);
    for (long h = 0; h < heads; h++) best[h] = NONE;
    for (long at = 0; at < count; at += CELLS) {
        const char *key[CELLS], *value[CELLS], *after[CELLS], *query[TOKENS];
        for (long h = 0; h < heads; h += least_of(TOKENS, s->sharing - h % s->sharing)) {
            long begin = (first + h / s->sharing) * bytes, together = least_of(TOKENS, s->sharing - h % s->sharing);
            for (int i = 0; i < CELLS; i++) {
                key[i] = s->keys + cells[least_of(at + i, count - 1)] * s->stride + begin;
                value[i] = s->values + cells[least_of(at + i, count - 1)] * s->stride + begin;
            }
            for (int i = 0; i < TOKENS; i++) query[i] = q + (first * s->sharing + h + least_of(i, together - 1)) * bytes;
#define CALL(n) score(query, n, key, value, bytes, scores + h * CELLS, half)
            UNROLLED(together, CALL)
#undef CALL
        }
        for (long h = 0; h < heads; h++)
            soften(s, scores + h * CELLS, least_of(CELLS, count - at), best + h, mass + h, sums + h * line, line);
        for (long h = 0; h < heads; h += least_of(TOKENS, s->sharing - h % s->sharing)) {
            long begin = (first + h / s->sharing) * bytes, together = least_of(TOKENS, s->sharing - h % s->sharing);
            for (int i = 0; i < CELLS; i++) {
                value[i] = s->values + cells[least_of(at + i, count - 1)] * s->stride + begin;
                after[i] = s->keys + cells[least_of(at + CELLS + i, count - 1)] * s->stride + begin;
            }
#define CALL(n) weigh(scores + h * CELLS, n, value, after, bytes, sums + h * line, line, half)
            UNROLLED(together, CALL)
#undef CALL
        }
    }
    for (long h = 0; h < heads; h++)
        finish(out + (first * s->sharing + h) * bytes, sums + h * line, 1 / mass[h], 0, bytes, half);
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
#define PART(half, bits) attend_part(s, q, q_stride, out, thread, all, half)
    IN_THREADS(0, PART)
#undef PART
}

/* y = silu(g) * u, over `bytes` bytes; silu is rounded to its own type first, as the models do. */
INLINE void gate_row(const char *g, const char *u, char *y, long bytes, int half)
{
    char spare[STEP], other[STEP], end[STEP];
    for (long at = 0; at < bytes; at += STEP) {
        const char *v = filled(spare, g + at, bytes - at), *w = filled(other, u + at, bytes - at);
        floats parts[2];
        for (int part = 0; part < PARTS; part++) {
            floats x = load(v, part, half);
            float numbers[LANES];
            memcpy(numbers, &x, STEP);
            for (int i = 0; i < LANES; i++) numbers[i] = numbers[i] / (1 + power(-LOG2E * numbers[i]));
            memcpy(&x, numbers, STEP);
            if (half) x = (floats)rounded(x);
            parts[part] = x * load(w, part, half);
        }
        store(bytes - at < STEP ? end : y + at, parts, half);
        if (bytes - at < STEP) memcpy(y + at, end, bytes - at);
    }
}

/* `rows` rows of `width` numbers, those of g and u `stride` bytes apart. */
void gate(const char *g, long g_stride, const char *u, long u_stride, long rows, long width, char *y, int half, int threads)
{
#define PART(half, bits)                                                                             \
    for (long i = rows * thread / all; i < rows * (thread + 1) / all; i++)                           \
    gate_row(g + i * g_stride, u + i * u_stride, y + i * width * SIZE, width * SIZE, half)
    IN_THREADS(0, PART)
#undef PART
}

/* `rows` rows of `width` numbers. */
void norm(const char *x, long rows, long width, const char *weight, float eps, char *y, int half, int threads)
{
#define PART(half, bits)                                                                             \
    for (long i = rows * thread / all; i < rows * (thread + 1) / all; i++)                           \
    normalise(x + i * width * SIZE, weight, width * SIZE, eps, y + i * width * SIZE, half)
    IN_THREADS(0, PART)
#undef PART
}
