/* What the cores that this may use reach together: reading memory, and products of 8 bits summed in 32. As JSON. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define BYTES (1ul << 30)
#define CHAINS 16 /* of products that do not wait for each other: a register each */
#define STEPS 8000000l
#define REPEATS 5

#if defined(__AMX_INT8__)
#define WHY "it has AMX, whose peak this does not measure"
#elif defined(__AVX512VNNI__)
#define LANES 64
#define PRODUCT "vpdpbusd %%zmm\\i, %%zmm\\i, %%zmm\\i"
#elif defined(__AVXVNNI__)
#define LANES 32
#define PRODUCT "%{vex%} vpdpbusd %%ymm\\i, %%ymm\\i, %%ymm\\i"
#else
#define WHY "it has no instruction for products of 8 bits that this knows"
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

#ifndef WHY
static double int8_ops_per_s(void)
{
    double began = now(), operations = 0;
#pragma omp parallel reduction(+ : operations)
    {
        for (long step = 0; step < STEPS; step++)
            __asm__ volatile(".irp i, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n\t" PRODUCT "\n\t.endr" ::
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
    double read = 0, speed;
    if (!values)
        return 1;
    memset(values, 1, BYTES);
    for (int i = 0; i < REPEATS; i++)
        read = (speed = read_bytes_per_s(values, &sum)) > read ? speed : read;
    printf("{\"sum\": %lu, \"read_bytes_per_s\": %.0f, ", sum, read); /* what nobody wants would not be read */
#ifdef WHY
    printf("\"int8_ops_per_s\": null, \"why\": \"%s\"}\n", WHY);
#else
    double products = 0;
    for (int i = 0; i < REPEATS; i++)
        products = (speed = int8_ops_per_s()) > products ? speed : products;
    printf("\"int8_ops_per_s\": %.0f, \"why\": \"\"}\n", products);
#endif
    return 0;
}
