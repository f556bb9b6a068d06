/* y = x · w + bias with x rounded to int8, block by block of each row, w in int4 with a scale a block, sums of a block in
 * int32, of blocks in fp32. A row's result does not depend on what other rows there are, nor on threads: every path adds
 * the same numbers in the same order. */
#include "matmul.h"

#if defined(__x86_64__) && !defined(PORTABLE) /* which tests define, to see what other CPUs compute */
#define WIDE_PATH
#endif

#include <math.h>
#include <string.h>

#define MOST_ROWS 12     /* of a tile: with two panels 24 sums, which leaves registers for what they are made of */
#define SLAB 4096        /* inputs whose weights are unpacked at once: 128 KiB of the stack */
#define TASK_BYTES 65536 /* of weights in a task: long enough to be worth its start, short enough to even threads out */
#define MOST_SIZE (1 << 24)
#define ALIGNMENT 64
#define LEAST 1e-30f             /* a block whose largest value is smaller counts as 0: the reciprocal would overflow */
#define MAGNITUDE 0x7fffffffu    /* of the bits of a value */
#define NOT_FINITE 0x7f800000u   /* from this magnitude on */

static int64_t rounded_up(int64_t value, int64_t unit)
{
    return (value + unit - 1) / unit * unit;
}

int64_t matmul_panels(const matmul *m)
{
    return (m->outputs + PANEL - 1) / PANEL * (1 + m->gated);
}

int matmul_takes(int64_t inputs, int64_t outputs, int64_t block, int64_t gated)
{
    return inputs > 0 && inputs <= MOST_SIZE && outputs > 0 && outputs <= MOST_SIZE && /* nothing below overflows */
           block > 0 && block <= SLAB && block % (2 * WORD) == 0 && inputs % block == 0 &&
           (gated == 0 || (gated == 1 && inputs <= SLAB)); /* sums of two panels cannot wait in one of y */
}

size_t matmul_plan(matmul *m)
{
    m->tiles = (m->rows + MOST_ROWS - 1) / MOST_ROWS;
    m->tile_rows = m->tiles ? (m->rows + m->tiles - 1) / m->tiles : 0;
    m->task_panels = rounded_up(TASK_BYTES / (m->inputs * PANEL / 2) + 1, 2);
    m->tasks = (matmul_panels(m) + m->task_panels - 1) / m->task_panels;
    size_t rows = m->tiles * m->tile_rows, blocks = m->inputs / m->block;
    return rounded_up(rows * (m->inputs + blocks * (sizeof *m->steps + sizeof *m->shifts)), ALIGNMENT);
}

void matmul_place(matmul *m, void *memory)
{
    size_t rows = m->tiles * m->tile_rows, blocks = m->inputs / m->block;
    m->words = memory;
    m->steps = (float *)((char *)memory + rows * m->inputs);
    m->shifts = (int32_t *)(m->steps + rows * blocks);
}

/* The step of a block by its largest magnitude, given as bits, and by what a value is multiplied to count steps. What is not
 * finite makes the step, and so every result of the row, not a number. */
static inline float step_of(uint32_t most, float *per_step)
{
    float largest;
    memcpy(&largest, &most, sizeof largest);
    *per_step = most >= NOT_FINITE || largest < LEAST ? 0 : 127 / largest;
    return most >= NOT_FINITE ? NAN : largest / 127;
}

/* The words of one block of a row, `stride` apart; gives the step, and the sum by ZERO in `shift`. */
static float round_block(const float *x, int64_t block, int32_t *words, int64_t stride, int32_t *shift)
{
    uint32_t most = 0;
    for (int64_t k = 0; k < block; k++) {
        uint32_t bits;
        memcpy(&bits, x + k, sizeof bits);
        bits &= MAGNITUDE;
        most = bits > most ? bits : most;
    }
    float per_step, step = step_of(most, &per_step);
    int32_t sum = 0;
    for (int64_t k = 0; k < block; k += WORD) {
        int8_t values[WORD];
        for (int i = 0; i < WORD; i++) {
            values[i] = per_step != 0 ? (int8_t)rintf(x[k + i] * per_step) : 0;
            sum += values[i];
        }
        memcpy(words + k / WORD * stride, values, sizeof values);
    }
    *shift = -ZERO * sum;
    return step;
}

static inline void round_rows(
    const matmul *m, int64_t tile, float (*round_one)(const float *, int64_t, int32_t *, int64_t, int32_t *))
{
    int64_t blocks = m->inputs / m->block, stride = m->tile_rows;
    for (int64_t b = 0; b < blocks; b++) { /* the words of all rows lie side by side */
        for (int64_t r = 0; r < stride; r++) {
            int64_t row = tile * stride + r < m->rows ? tile * stride + r : m->rows - 1; /* behind the last one: any */
            int64_t at = (tile * blocks + b) * stride + r;
            int32_t *words = m->words + (tile * m->inputs + b * m->block) / WORD * stride + r;
            m->steps[at] = round_one(m->x + row * m->inputs + b * m->block, m->block, words, stride, m->shifts + at);
        }
    }
}

/* What any CPU computes: a row with a panel. */
static void add_panel(const matmul *m, int64_t row, int64_t panel, float sums[PANEL])
{
    int64_t blocks = m->inputs / m->block, pairs = m->block / (2 * WORD);
    int64_t tile = row / m->tile_rows, r = row % m->tile_rows;
    for (int64_t b = 0; b < blocks; b++) {
        int64_t at = (tile * blocks + b) * m->tile_rows + r;
        int32_t whole[PANEL];
        for (int n = 0; n < PANEL; n++)
            whole[n] = m->shifts[at];
        for (int64_t p = 0; p < pairs; p++) {
            const uint8_t *packed = m->weights + ((panel * blocks + b) * pairs + p) * PANEL * WORD;
            const int32_t *word = m->words + (tile * m->inputs / WORD + (b * pairs + p) * 2) * m->tile_rows + r;
            int8_t low[WORD], high[WORD];
            memcpy(low, word, sizeof low);
            memcpy(high, word + m->tile_rows, sizeof high);
            for (int n = 0; n < PANEL; n++)
                for (int i = 0; i < WORD; i++)
                    whole[n] += (packed[n * WORD + i] & 15) * low[i] + (packed[n * WORD + i] >> 4) * high[i];
        }
        for (int n = 0; n < PANEL; n++)
            sums[n] += whole[n] * (m->scales[(panel * blocks + b) * PANEL + n] * m->steps[at]);
    }
}

static void multiply_panels(const matmul *m, int64_t panel)
{
    int64_t first = panel / (1 + m->gated) * PANEL, count = m->outputs - first < PANEL ? m->outputs - first : PANEL;
    for (int64_t row = 0; row < m->rows; row++) {
        float sums[PANEL] = {0}, gated[PANEL] = {0};
        add_panel(m, row, panel, sums);
        if (m->gated)
            add_panel(m, row, panel + 1, gated);
        for (int64_t n = 0; n < count; n++) {
            float *y = m->y + row * m->outputs + first + n;
            *y = m->gated ? sums[n] / (1 + expf(-sums[n])) * gated[n] : sums[n] + (m->bias ? m->bias[first + n] : 0);
        }
    }
}

#if defined(WIDE_PATH)
#include <immintrin.h>

#define WIDE 16 /* values of fp32 in a register */
#define VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni,fma")))
#define AHEAD 2048 /* bytes that are asked for before they are needed, of weights in memory, where a page ends too, */
#define NEAR 1024  /* and of what lies in the second cache */

/* `do` for each row of a tile. Sums have names of their own, and the product is written out, because compilers move the
 * elements of an array, and what the intrinsic gives, between registers and memory in every step. */
#define ROWS_1(do) do(0)
#define ROWS_2(do) ROWS_1(do) do(1)
#define ROWS_3(do) ROWS_2(do) do(2)
#define ROWS_4(do) ROWS_3(do) do(3)
#define ROWS_5(do) ROWS_4(do) do(4)
#define ROWS_6(do) ROWS_5(do) do(5)
#define ROWS_7(do) ROWS_6(do) do(6)
#define ROWS_8(do) ROWS_7(do) do(7)
#define ROWS_9(do) ROWS_8(do) do(8)
#define ROWS_10(do) ROWS_9(do) do(9)
#define ROWS_11(do) ROWS_10(do) do(10)
#define ROWS_12(do) ROWS_11(do) do(11)
#define ADD_PRODUCTS(sum, weights, word) __asm__("vpdpbusd %1%{1to16%}, %2, %0" : "+v"(sum) : "m"(word), "v"(weights))

VNNI static inline __m512 added(__m512 sums, __m512i whole, __m512 scales, float step)
{
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole), _mm512_mul_ps(scales, _mm512_set1_ps(step)), sums);
}

VNNI static inline __mmask16 outputs_of(const matmul *m, int64_t panel)
{
    int64_t left = m->outputs - panel * PANEL;
    return left < PANEL ? (__mmask16)((1u << left) - 1) : (__mmask16)-1;
}

VNNI static inline __m512 got(const matmul *m, int64_t row, int64_t panel)
{
    return _mm512_maskz_loadu_ps(outputs_of(m, panel), m->y + row * m->outputs + panel * PANEL);
}

/* One tile with one panel: what waits for weights, so they are unpacked as they come. */
#define BEGIN_FEW(r) __m512 sums##r = _mm512_setzero_ps();
#define BEGIN_BLOCK(r) __m512i low##r = _mm512_set1_epi32(shifts[r]), high##r = _mm512_setzero_si512();
#define ADD_LOW(r) ADD_PRODUCTS(low##r, low, words[r]);
#define ADD_HIGH(r) ADD_PRODUCTS(high##r, high, words[count + r]);
#define END_BLOCK(r) sums##r = added(sums##r, _mm512_add_epi32(low##r, high##r), scale, steps[r]);
#define END_FEW(r) _mm512_store_ps(sums + 2 * PANEL * r, sums##r);
#define FEW(rows)                                                                                                            \
    VNNI static void few_##rows(const matmul *m, int64_t panel, float *sums)                                                 \
    {                                                                                                                        \
        enum { count = rows };                                                                                               \
        int64_t blocks = m->inputs / m->block, pairs = m->block / (2 * WORD);                                                \
        const uint8_t *weights = m->weights + panel * m->inputs * PANEL / 2;                                                 \
        const float *scales = m->scales + panel * blocks * PANEL, *steps = m->steps;                                         \
        const int32_t *words = m->words, *shifts = m->shifts;                                                                \
        const __m512i half = _mm512_set1_epi8(15);                                                                           \
        ROWS_##rows(BEGIN_FEW)                                                                                               \
        for (int64_t b = 0; b < blocks; b++) {                                                                               \
            ROWS_##rows(BEGIN_BLOCK)                                                                                         \
            for (int64_t p = 0; p < pairs; p++) {                                                                            \
                __m512i packed = _mm512_loadu_si512(weights);                                                                \
                _mm_prefetch((const char *)weights + AHEAD, _MM_HINT_T0);                                                    \
                __m512i low = _mm512_and_si512(packed, half);                                                                \
                __m512i high = _mm512_and_si512(_mm512_srli_epi16(packed, 4), half);                                         \
                ROWS_##rows(ADD_LOW)                                                                                         \
                ROWS_##rows(ADD_HIGH)                                                                                        \
                weights += PANEL * WORD;                                                                                     \
                words += 2 * count;                                                                                          \
            }                                                                                                                \
            __m512 scale = _mm512_loadu_ps(scales);                                                                          \
            ROWS_##rows(END_BLOCK)                                                                                           \
            scales += PANEL, steps += count, shifts += count;                                                                \
        }                                                                                                                    \
        ROWS_##rows(END_FEW)                                                                                                 \
    }
FEW(1) FEW(2) FEW(3) FEW(4) FEW(5) FEW(6) FEW(7) FEW(8) FEW(9) FEW(10) FEW(11) FEW(12)

/* One tile with two panels, and a slab of inputs whose weights are unpacked: what waits for products. */
#define BEGIN_PAIR(r) __m512i left##r = _mm512_set1_epi32(shifts[r]), right##r = left##r;
#define ADD_PAIR(r) ADD_PRODUCTS(left##r, left, words[r]); ADD_PRODUCTS(right##r, right, words[r]);
#define END_PAIR(r)                                                                                                          \
    {                                                                                                                        \
        float *sum = sums + 2 * PANEL * r;                                                                                   \
        _mm512_store_ps(sum, added(_mm512_load_ps(sum), left##r, _mm512_loadu_ps(scales), steps[r]));                        \
        _mm512_store_ps(sum + PANEL, added(_mm512_load_ps(sum + PANEL), right##r, _mm512_loadu_ps(beside), steps[r]));       \
    }
#define MANY(rows)                                                                                                           \
    VNNI static void many_##rows(                                                                                            \
        const matmul *m, const uint8_t *unpacked, const int32_t *words, const float *steps, const int32_t *shifts,           \
        const float *scales, const float *beside, int64_t blocks, float *sums)                                               \
    {                                                                                                                        \
        enum { count = rows };                                                                                               \
        for (int64_t b = 0; b < blocks; b++) {                                                                               \
            ROWS_##rows(BEGIN_PAIR)                                                                                          \
            for (int64_t k = 0; k < m->block; k += WORD) {                                                                   \
                __m512i left = _mm512_load_si512(unpacked), right = _mm512_load_si512(unpacked + PANEL * WORD);              \
                _mm_prefetch((const char *)(unpacked + NEAR), _MM_HINT_T0);                                                  \
                _mm_prefetch((const char *)(unpacked + NEAR + PANEL * WORD), _MM_HINT_T0);                                   \
                _mm_prefetch((const char *)words + NEAR, _MM_HINT_T0);                                                       \
                ROWS_##rows(ADD_PAIR)                                                                                        \
                unpacked += 2 * PANEL * WORD;                                                                                \
                words += count;                                                                                              \
            }                                                                                                                \
            ROWS_##rows(END_PAIR)                                                                                            \
            scales += PANEL, beside += PANEL, steps += count, shifts += count;                                               \
        }                                                                                                                    \
    }
MANY(7) MANY(8) MANY(9) MANY(10) MANY(11) MANY(12)
#define EACH_FEW {0, few_1, few_2, few_3, few_4, few_5, few_6, few_7, few_8, few_9, few_10, few_11, few_12}
#define EACH_MANY {0, 0, 0, 0, 0, 0, 0, many_7, many_8, many_9, many_10, many_11, many_12} /* see matmul_plan */

/* exp(x), by x = n ln 2 + r and the Taylor series of r up to the 6th power, which is exact to the last bit or two. */
VNNI static inline __m512 exponential(__m512 x)
{
    x = _mm512_max_ps(_mm512_set1_ps(-128), _mm512_min_ps(_mm512_set1_ps(128), x)); /* what is no number stays so */
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x); /* ln 2 in two parts */
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    static const float terms[] = {1, 1, 1.f / 2, 1.f / 6, 1.f / 24, 1.f / 120, 1.f / 720};
    __m512 sum = _mm512_set1_ps(terms[6]);
    for (int i = 5; i >= 0; i--)
        sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(terms[i]));
    return _mm512_scalef_ps(sum, n);
}

/* Sums of a row with one or two panels, into y: whole ones if `is_last`, else to wait there for the next slab. */
VNNI static inline void put(const matmul *m, int64_t row, int64_t panel, int64_t count, const float *sums, int is_last)
{
    if (m->gated) {
        __m512 gate = _mm512_load_ps(sums), one = _mm512_set1_ps(1);
        __m512 opened = _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), gate)));
        __m512 result = _mm512_mul_ps(_mm512_div_ps(gate, opened), _mm512_load_ps(sums + PANEL));
        _mm512_mask_storeu_ps(m->y + row * m->outputs + panel / 2 * PANEL, outputs_of(m, panel / 2), result);
        return;
    }
    for (int64_t side = 0; side < count; side++) {
        __m512 result = _mm512_load_ps(sums + side * PANEL);
        __mmask16 mask = outputs_of(m, panel + side);
        if (m->bias && is_last)
            result = _mm512_add_ps(result, _mm512_maskz_loadu_ps(mask, m->bias + (panel + side) * PANEL));
        _mm512_mask_storeu_ps(m->y + row * m->outputs + (panel + side) * PANEL, mask, result);
    }
}

VNNI static void unpack(const uint8_t *packed, int64_t inputs, uint8_t *unpacked)
{
    const __m512i half = _mm512_set1_epi8(15);
    for (int64_t k = 0; k < inputs; k += 2 * WORD, packed += PANEL * WORD, unpacked += 4 * PANEL * WORD) {
        __m512i both = _mm512_loadu_si512(packed);
        _mm512_store_si512(unpacked, _mm512_and_si512(both, half));
        _mm512_store_si512(unpacked + 2 * PANEL * WORD, _mm512_and_si512(_mm512_srli_epi16(both, 4), half));
    }
}

VNNI static void multiply_few(const matmul *m, int64_t panel, int64_t count)
{
    static void (*const few[])(const matmul *, int64_t, float *) = EACH_FEW;
    _Alignas(64) float sums[MOST_ROWS * 2 * PANEL];
    for (int64_t side = 0; side < count; side++)
        few[m->tile_rows](m, panel + side, sums + side * PANEL);
    for (int64_t r = 0; r < m->rows; r++)
        put(m, r, panel, count, sums + 2 * r * PANEL, 1);
}

VNNI static void multiply_many(const matmul *m, int64_t panel, int64_t count)
{
    static void (*const many[])(
        const matmul *, const uint8_t *, const int32_t *, const float *, const int32_t *, const float *, const float *,
        int64_t, float *) = EACH_MANY;
    int64_t blocks = m->inputs / m->block, slab = SLAB / m->block * m->block;
    int64_t beside = panel + count - 1; /* the last one may stand alone */
    _Alignas(64) uint8_t unpacked[SLAB * 2 * PANEL];
    _Alignas(64) float sums[MOST_ROWS * 2 * PANEL];
    for (int64_t first = 0; first < m->inputs; first += slab) {
        int64_t length = m->inputs - first < slab ? m->inputs - first : slab, block = first / m->block;
        int is_last = first + length == m->inputs;
        unpack(m->weights + (panel * m->inputs + first) * PANEL / 2, length, unpacked);
        unpack(m->weights + (beside * m->inputs + first) * PANEL / 2, length, unpacked + PANEL * WORD);
        for (int64_t tile = 0; tile < m->tiles; tile++) {
            int64_t at = (tile * blocks + block) * m->tile_rows, top = tile * m->tile_rows;
            int64_t rows = m->rows - top < m->tile_rows ? m->rows - top : m->tile_rows;
            for (int64_t r = 0; r < rows; r++)
                for (int64_t side = 0; side < 2 - m->gated; side++)
                    __builtin_prefetch(m->y + (top + r) * m->outputs + (panel / (1 + m->gated) + side) * PANEL, 1);
            memset(sums, 0, sizeof sums);
            for (int64_t r = 0; r < rows && first; r++) /* between slabs they wait in y */
                for (int64_t side = 0; side < 2; side++)
                    _mm512_store_ps(sums + (2 * r + side) * PANEL, got(m, top + r, side ? beside : panel));
            many[m->tile_rows](
                m, unpacked, m->words + (tile * m->inputs + first) / WORD * m->tile_rows, m->steps + at, m->shifts + at,
                m->scales + (panel * blocks + block) * PANEL, m->scales + (beside * blocks + block) * PANEL,
                length / m->block, sums);
            for (int64_t r = 0; r < rows; r++)
                put(m, top + r, panel, count, sums + 2 * r * PANEL, is_last);
        }
    }
}

/* `round_block`, of the values that are left over in the last 16 too. */
VNNI static float round_block_wide(const float *x, int64_t block, int32_t *words, int64_t stride, int32_t *shift)
{
    const __m512i magnitude = _mm512_set1_epi32(MAGNITUDE);
    __m512i most = _mm512_setzero_si512();
    for (int64_t k = 0; k < block; k += WIDE) {
        __mmask16 mask = block - k < WIDE ? (__mmask16)((1u << (block - k)) - 1) : (__mmask16)-1;
        __m512i bits = _mm512_maskz_loadu_epi32(mask, x + k);
        most = _mm512_max_epu32(most, _mm512_and_si512(bits, magnitude));
    }
    float per_step, step = step_of(_mm512_reduce_max_epu32(most), &per_step);
    __m512i sum = _mm512_setzero_si512();
    for (int64_t k = 0; k < block; k += WIDE) {
        __mmask16 mask = block - k < WIDE ? (__mmask16)((1u << (block - k)) - 1) : (__mmask16)-1;
        __m512 scaled = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x + k), _mm512_set1_ps(per_step));
        __m512i whole = per_step != 0 ? _mm512_cvtps_epi32(scaled) : _mm512_setzero_si512();
        sum = _mm512_add_epi32(sum, whole);
        int32_t four[WIDE / WORD];
        _mm_storeu_si128((__m128i *)four, _mm512_cvtepi32_epi8(whole));
        for (int64_t i = 0; i < WIDE / WORD && k + i * WORD < block; i++)
            words[(k / WORD + i) * stride] = four[i];
    }
    *shift = -ZERO * _mm512_reduce_add_epi32(sum);
    return step;
}

VNNI static void round_wide(const matmul *m, int64_t tile)
{
    round_rows(m, tile, round_block_wide);
}

static int has_vnni(void)
{
    return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("fma");
}
#endif

void matmul_round(const matmul *m, int64_t tile)
{
#if defined(WIDE_PATH)
    if (has_vnni()) {
        round_wide(m, tile);
        return;
    }
#endif
    round_rows(m, tile, round_block);
}

void matmul_multiply(const matmul *m, int64_t task)
{
    int64_t first = task * m->task_panels, last = first + m->task_panels;
    last = last < matmul_panels(m) ? last : matmul_panels(m);
#if defined(WIDE_PATH)
    if (has_vnni()) {
        for (int64_t panel = first; panel < last; panel += 2)
            (m->tiles == 1 ? multiply_few : multiply_many)(m, panel, last - panel < 2 ? 1 : 2);
        return;
    }
#endif
    for (int64_t panel = first; panel < last; panel += 1 + m->gated)
        multiply_panels(m, panel);
}
