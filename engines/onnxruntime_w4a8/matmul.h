/* Products of fp32 rows with int4 weights, as threads share them. */
#pragma once
#include <stddef.h>
#include <stdint.h>

#define PANEL 16 /* outputs whose weights lie side by side: a register of int32 */
#define WORD 4   /* inputs of which one instruction adds the products: an int32 of int8 */
#define ZERO 8   /* what a weight of 0 is stored as, in 4 bits without sign */

/* y = x · w + bias, or, gated, y = silu(x · w of the gate) * (x · w of what it gates), whose panels take turns and which have
 * no bias. N is padded to whole panels in weights and scales, not in bias and y. */
typedef struct {
    int64_t rows, inputs, outputs, block; /* M, K, N; a block of inputs has one scale, K a multiple of it, it of 2 words */
    int64_t gated;                        /* 0 or 1 */
    const float *x;                       /* [M, K] */
    const uint8_t *weights;               /* [panels, K / 8, 16, 4]: of 8 inputs the first 4 in the low halves of bytes */
    const float *scales;                  /* [panels, K / block, 16] */
    const float *bias;                    /* [N], or NULL */
    float *y;                             /* [M, N] */
    /* The rows of x in int8, in tiles that are multiplied together; `matmul_plan` says how, `matmul_round` writes them. */
    int64_t tiles, tile_rows;
    int32_t *words;    /* [tiles, K / 4, tile_rows] */
    float *steps;      /* [tiles, K / block, tile_rows]: what a 1 of such a word is */
    int32_t *shifts;   /* [tiles, K / block, tile_rows]: what ZERO adds to a block's sum, to be taken off */
    int64_t tasks;     /* of `matmul_multiply` */
    int64_t task_panels;
} matmul;

/* Whether it multiplies weights of these sizes. */
int matmul_takes(int64_t inputs, int64_t outputs, int64_t block, int64_t gated);
/* Panels of 16 outputs, N / 16 of them, twice if it is gated. */
int64_t matmul_panels(const matmul *m);
/* Decides how a product is computed, from its sizes, and gives the bytes that it needs for that. */
size_t matmul_plan(matmul *m);
/* Puts the words, steps and shifts into so many bytes, aligned to 64. */
void matmul_place(matmul *m, void *memory);
/* Rounds the rows of one of `tiles`. */
void matmul_round(const matmul *m, int64_t tile);
/* Computes the outputs of one of `tasks`, once every tile is rounded. */
void matmul_multiply(const matmul *m, int64_t task);
