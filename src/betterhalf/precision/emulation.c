/* Rounding to emulated formats, as in precision/emulation.py: to nearest, ties to even; NaN stays NaN.
 *
 * dropped: lowest mantissa bits of BF16 that the format does not store, 0 to 7. Overflow carries into the exponent and
 * gives infinity; subnormal numbers need no other rule. `in` and `out` may be the same.
 */
#include <stdint.h>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define FOR_EVERY_PROCESSOR __attribute__((target_clones("avx2", "default")))
#else
#define FOR_EVERY_PROCESSOR
#endif

FOR_EVERY_PROCESSOR
void round_bf16(const uint16_t *in, uint16_t *out, int64_t count, int dropped) {
    const uint16_t last = dropped ? (uint16_t)(1 << dropped) : 0, half = dropped ? (uint16_t)(last / 2 - 1) : 0;
    const uint16_t kept = (uint16_t)(0xFFFF << dropped);
    for (int64_t k = 0; k < count; k++) {
        uint16_t bits = in[k], odd = (bits & last) ? 1 : 0;
        uint16_t rounded = (uint16_t)(bits + half + odd) & kept;
        out[k] = (bits & 0x7FFF) > 0x7F80 ? bits : rounded;
    }
}

/* FP32 numbers, rounded to BF16 and then to the grid; the results are FP32 numbers. */
FOR_EVERY_PROCESSOR
void round_fp32(const uint32_t *in, uint32_t *out, int64_t count, int dropped) {
    const uint32_t last = dropped ? 0x10000u << dropped : 0, half = dropped ? last / 2 - 0x10000u : 0;
    const uint32_t kept = 0xFFFF0000u << dropped;
    for (int64_t k = 0; k < count; k++) {
        uint32_t bits = in[k], carrier = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000u;
        uint32_t rounded = (carrier + half + ((carrier & last) ? 0x10000u : 0)) & kept;
        out[k] = (bits & 0x7FFFFFFF) > 0x7F800000 ? bits : rounded;
    }
}
