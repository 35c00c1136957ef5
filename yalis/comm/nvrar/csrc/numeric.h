// Element types: how 16 bytes of a message become floats and back.
//
// Rounding is to nearest even. Every NaN becomes one pattern: sums of NaNs keep an operand's payload on some machines,
// and then two ranks that add the same numbers in another order would differ in bits.
#pragma once

#include <cstring>

#include "portable.h"

namespace nvrar {

struct alignas(16) Pack {
    uint32_t w[4];
};

NVRAR_PURE float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

NVRAR_PURE uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

NVRAR_PURE bool is_nan(uint32_t bits) { return (bits & 0x7FFFFFFFu) > 0x7F800000u; }

struct F32 {
    using Bits = uint32_t;
    static constexpr int kPerPack = 4;
    static constexpr Bits kNan = 0x7FFFFFFFu;

    static NVRAR_PURE void widen(const Pack& p, float (&v)[4]) {
        NVRAR_UNROLL
        for (int k = 0; k < 4; ++k) v[k] = float_of(p.w[k]);
    }
    static NVRAR_PURE void narrow(const float (&v)[4], Pack& p) {
        NVRAR_UNROLL
        for (int k = 0; k < 4; ++k) {
            const uint32_t bits = bits_of(v[k]);
            p.w[k] = is_nan(bits) ? kNan : bits;
        }
    }
};

// The two 16-bit types differ in the conversion of one pair only.
template <class Half>
struct Paired {
    using Bits = uint16_t;
    static constexpr int kPerPack = 8;
    static constexpr Bits kNan = 0x7FFFu;

    static NVRAR_PURE void widen(const Pack& p, float (&v)[8]) {
        NVRAR_UNROLL
        for (int k = 0; k < 4; ++k) {
            v[2 * k] = Half::to_float(static_cast<uint16_t>(p.w[k] & 0xFFFFu));
            v[2 * k + 1] = Half::to_float(static_cast<uint16_t>(p.w[k] >> 16));
        }
    }
    static NVRAR_PURE void narrow(const float (&v)[8], Pack& p) {
        NVRAR_UNROLL
        for (int k = 0; k < 4; ++k) p.w[k] = Half::pair(v[2 * k], v[2 * k + 1]);
    }
};

struct HalfBrain {
    static NVRAR_PURE float to_float(uint16_t bits) { return float_of(static_cast<uint32_t>(bits) << 16); }
    static NVRAR_PURE uint16_t from_float(float value) {
        const uint32_t bits = bits_of(value);
        if (is_nan(bits)) return 0x7FFFu;
        return static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
    }
    static NVRAR_PURE uint32_t pair(float low, float high) {
#if NVRAR_ON_GPU
        uint32_t both;
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
        return both;
#else
        return from_float(low) | static_cast<uint32_t>(from_float(high)) << 16;
#endif
    }
};

struct HalfIeee {
    static NVRAR_PURE float to_float(uint16_t half) {
#if NVRAR_ON_GPU
        float value;
        asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
        return value;
#else
        const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
        const uint32_t rest = half & 0x7FFFu;
        if (rest >= 0x7C00u) return float_of(sign | 0x7F800000u | (rest & 0x3FFu) << 13);
        // A subnormal half is an integer multiple of 2^-24; a normal one only needs another bias.
        if (rest < 0x400u) {
            const float magnitude = static_cast<float>(rest) * 5.9604644775390625e-8f;
            return sign ? -magnitude : magnitude;
        }
        return float_of(sign | ((rest << 13) + (112u << 23)));
#endif
    }
    static NVRAR_PURE uint16_t from_float(float value) {
        const uint32_t bits = bits_of(value);
        if (is_nan(bits)) return 0x7FFFu;
        const uint32_t sign = (bits >> 16) & 0x8000u;
        const uint32_t rest = bits & 0x7FFFFFFFu;
        if (rest >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7C00u);  // 2^16 and above
        if (rest < 0x38800000u) {  // below 2^-14: a multiple of 2^-24; adding 0.5 aligns it and rounds
            const float shifted = float_of(rest) + 0.5f;
            return static_cast<uint16_t>(sign | (bits_of(shifted) - bits_of(0.5f)));
        }
        const uint32_t rebased = rest - (112u << 23);
        return static_cast<uint16_t>(sign | ((rebased + 0xFFFu + ((rebased >> 13) & 1u)) >> 13));
    }
    static NVRAR_PURE uint32_t pair(float low, float high) {
#if NVRAR_ON_GPU
        uint32_t both;
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
        return both;
#else
        return from_float(low) | static_cast<uint32_t>(from_float(high)) << 16;
#endif
    }
};

struct BF16 : Paired<HalfBrain> {};
struct F16 : Paired<HalfIeee> {};

}  // namespace nvrar
