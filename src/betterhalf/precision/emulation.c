/* Rounding to emulated formats, as in precision/emulation.py: to nearest, ties to even; NaN stays NaN.
 *
 * dropped: lowest mantissa bits of BF16 that the format does not store, 0 to 7. Overflow carries into the exponent and
 * gives infinity; subnormal numbers need no other rule. `in` and `out` may be the same.
 */
#include <stdint.h>

static inline uint16_t on_grid(uint16_t bits, int dropped, uint16_t half, uint16_t odd) {
    uint16_t rounded = (uint16_t)((bits + half + ((bits >> dropped) & odd)) >> dropped << dropped);
    return (bits & 0x7FFF) > 0x7F80 ? bits : rounded;
}

void round_bf16(const uint16_t *in, uint16_t *out, int64_t count, int dropped) {
    const uint16_t half = dropped ? (uint16_t)((1 << (dropped - 1)) - 1) : 0, odd = dropped ? 1 : 0;
    for (int64_t k = 0; k < count; k++) out[k] = on_grid(in[k], dropped, half, odd);
}

/* FP32 numbers, rounded to BF16 and then to the grid; the results are FP32 numbers. */
void round_fp32(const uint32_t *in, uint32_t *out, int64_t count, int dropped) {
    const uint32_t half = dropped ? (1u << (dropped - 1)) - 1 : 0, odd = dropped ? 1 : 0;
    for (int64_t k = 0; k < count; k++) {
        uint32_t bits = in[k], carrier = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
        uint32_t rounded = (carrier + half + ((carrier >> dropped) & odd)) >> dropped << (dropped + 16);
        out[k] = (bits & 0x7FFFFFFF) > 0x7F800000 ? bits : rounded;
    }
}
