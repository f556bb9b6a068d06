/* What the cores that this may use reach together: reading memory, and products of 8 bits summed in 32. As JSON. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#if defined(__AMX_INT8__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define BYTES (1ul << 30)
#define CHAINS 16 /* of products that do not wait for each other: a register each */
#define STEPS 8000000l
#define REPEATS 5

#if defined(__AVX512VNNI__)
#define VECTORS "AVX-512 VNNI"
#define LANES 64
#define VECTOR_PRODUCT "vpdpbusd %%zmm\\i, %%zmm\\i, %%zmm\\i"
#elif defined(__AVXVNNI__)
#define VECTORS "AVX-VNNI"
#define LANES 32
#define VECTOR_PRODUCT "%{vex%} vpdpbusd %%ymm\\i, %%ymm\\i, %%ymm\\i"
#endif

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + 1e-9 * time.tv_nsec;
}

static double read_bytes_per_s(const unsigned long *values, unsigned long *sum)
{
    double began = now();
    unsigned long total = 0;
#pragma omp parallel for simd reduction(+ : total) schedule(static)
    for (size_t i = 0; i < BYTES / sizeof *values; i++)
        total += values[i];
    *sum += total;
    return BYTES / (now() - began);
}

#if defined(__AMX_INT8__)
#define ROWS 16 /* of a tile, of 64 bytes each */
#define ROW_BYTES 64
#define TILES 8
#define SUMS 6 /* tiles that do not wait for each other; the other two are multiplied */
#define EACH_SUM(do) do(0); do(1); do(2); do(3); do(4); do(5);
#define PRODUCT(tile) _tile_dpbssd(tile, 6, 7)
#define TILE_STEPS (STEPS / 4)
#define TILE_DATA 18
#define ASK_PERMISSION 0x1023

/* A process has to ask the kernel for tiles before its first one. */
static int has_tiles(void)
{
    return !syscall(SYS_arch_prctl, ASK_PERMISSION, TILE_DATA);
}

static double by_tiles(void)
{
    static const struct {
        unsigned char palette, first_row, reserved[14];
        unsigned short row_bytes[16];
        unsigned char rows[16];
    } shapes = {1, 0, {0}, {[0 ... TILES - 1] = ROW_BYTES}, {[0 ... TILES - 1] = ROWS}};
    static const signed char ones[ROWS * ROW_BYTES] = {[0 ... ROWS * ROW_BYTES - 1] = 1};
    double began = now(), operations = 0;
#pragma omp parallel reduction(+ : operations)
    {
        _tile_loadconfig(&shapes);
        EACH_SUM(_tile_zero)
        _tile_loadd(6, ones, ROW_BYTES);
        _tile_loadd(7, ones, ROW_BYTES);
        for (long step = 0; step < TILE_STEPS; step++) {
            EACH_SUM(PRODUCT)
        }
        _tile_release();
        operations += 2.0 * ROWS * ROWS * ROW_BYTES * SUMS * TILE_STEPS;
    }
    return operations / (now() - began);
}
#endif

#if defined(VECTORS)
static double by_vectors(void)
{
    double began = now(), operations = 0;
#pragma omp parallel reduction(+ : operations)
    {
        for (long step = 0; step < STEPS; step++)
            __asm__ volatile(".irp i, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n\t" VECTOR_PRODUCT "\n\t.endr" ::
                                 : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9",
                                   "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");
        operations += 2.0 * LANES * CHAINS * STEPS;
    }
    return operations / (now() - began);
}
#endif

int main(void)
{
    unsigned long *values = aligned_alloc(2 << 20, BYTES), sum = 0;
    const char *instruction = NULL;
    double (*int8_ops_per_s)(void) = NULL;
    double read = 0, products = 0, speed;
    if (!values)
        return 1;
    memset(values, 1, BYTES);
    for (int i = 0; i < REPEATS; i++)
        read = (speed = read_bytes_per_s(values, &sum)) > read ? speed : read;
    printf("{\"sum\": %lu, \"read_bytes_per_s\": %.0f, ", sum, read); /* what nobody wants would not be read */
#if defined(VECTORS)
    instruction = VECTORS, int8_ops_per_s = by_vectors;
#endif
#if defined(__AMX_INT8__)
    if (has_tiles())
        instruction = "AMX", int8_ops_per_s = by_tiles;
#endif
    if (!instruction) {
        printf("\"int8_ops_per_s\": null, \"int8_instruction\": null, "
               "\"why\": \"it has no instruction for products of 8 bits that this knows\"}\n");
        return 0;
    }
    for (int i = 0; i < REPEATS; i++)
        products = (speed = int8_ops_per_s()) > products ? speed : products;
    printf("\"int8_ops_per_s\": %.0f, \"int8_instruction\": \"%s\", \"why\": \"\"}\n", products, instruction);
    return 0;
}
