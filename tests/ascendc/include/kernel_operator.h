// A stand-in for the part of Ascend C that our kernels use, for g++ on a host: it runs a kernel block by block, computes what
// the documentation says, counts, and ends the process with the name of the rule as soon as a kernel breaks one. Written from
// the public documentation only (ms_granvit/ops/ascendc/README.md lists the pages); it contains no code of CANN.
//
// What it cannot see: anything about time, and hazards between the scalar, vector and copy units other than those that the queues
// guard. `LocalTensor::GetValue` and `SetValue` are left out for that reason.
#ifndef ASCENDC_STAND_IN_H
#define ASCENDC_STAND_IN_H
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <initializer_list>
#include <string>
#include <type_traits>
#include <vector>

#define __aicore__
#define __global__
#define __gm__
#define GM_ADDR uint8_t *
#define KERNEL_TASK_TYPE_DEFAULT(type)
#define REGISTER_TILING_DEFAULT(Struct) using RegisteredTiling = Struct
#define GET_TILING_DATA(name, address) \
    RegisteredTiling name;             \
    std::memcpy(&name, address, sizeof name)

namespace harness {

struct Counts {
    uint64_t bytesIn, bytesOut, copies, bursts;      // between global memory and UB; a burst is one contiguous piece
    uint64_t instructions, elements, vectorBytes;    // vector instructions; vectorBytes: 256 for each repeat, which takes a cycle
    uint64_t conversions, scalarLoads;               // of the scalar unit: ScalarCast, GlobalTensor::GetValue
    uint64_t ubPeak;                                 // bytes of UB that buffers took
};

struct Region {
    std::string name;
    uint8_t *begin;
    uint64_t bytes;
    std::vector<uint16_t> writer;  // of an output: the block (+1) that wrote each pair of bytes. Empty for an input
};

inline Counts counts;
inline std::vector<Region> regions;
inline uint32_t block, blocks = 1;
inline uint64_t ubBytes = 192 * 1024;
inline bool arithmetic = true;  // false: rules and counts only

[[noreturn]] inline void Fail(const char *rule, const char *format, ...)
{
    std::fflush(stdout);
    std::fprintf(stderr, "%s: block %u: ", rule, block);
    va_list arguments;
    va_start(arguments, format);
    std::vfprintf(stderr, format, arguments);
    va_end(arguments);
    std::fprintf(stderr, "\n");
    std::_Exit(3);
}

inline Region &RegionOf(const void *address, uint64_t bytes)
{
    auto *at = static_cast<const uint8_t *>(address);
    for (Region &region : regions) {
        if (at >= region.begin && at + bytes <= region.begin + region.bytes) {
            return region;
        }
    }
    Fail("global memory out of range", "%llu bytes at %p are in no array", static_cast<unsigned long long>(bytes), address);
}

inline void ReadGlobal(const void *address, uint64_t bytes)
{
    Region &region = RegionOf(address, bytes);
    if (region.writer.empty()) {
        return;
    }
    for (uint64_t i = 0, first = static_cast<const uint8_t *>(address) - region.begin; i < bytes; i += 2) {
        uint16_t writer = region.writer[(first + i) / 2];
        if (writer != block + 1) {
            Fail("global memory read without synchronisation", "%s is written by %s", region.name.c_str(),
                 writer == 0 ? "nobody yet" : "another block");
        }
    }
}

inline void WriteGlobal(const void *address, uint64_t bytes)
{
    Region &region = RegionOf(address, bytes);
    if (region.writer.empty()) {
        Fail("write to an input", "%s", region.name.c_str());
    }
    for (uint64_t i = 0, first = static_cast<const uint8_t *>(address) - region.begin; i < bytes; i += 2) {
        uint16_t &writer = region.writer[(first + i) / 2];
        if (writer != 0 && writer != block + 1) {
            Fail("two blocks write one address", "%s at byte %llu, after block %u", region.name.c_str(),
                 static_cast<unsigned long long>(first + i), writer - 1);
        }
        writer = static_cast<uint16_t>(block + 1);
    }
}

// After the last block.
inline void CheckOutputs()
{
    for (const Region &region : regions) {
        for (uint16_t writer : region.writer) {
            if (writer == 0) {
                Fail("output not written", "a part of %s", region.name.c_str());
            }
        }
    }
}

template <typename To, typename From> To Bits(From from)
{
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

}  // namespace harness

// 16-bit numbers. Conversions round to nearest even; float16 saturates, as Cast does by default.
struct half {
    uint16_t bits = 0;
    half() = default;
    half(float value)
    {
        uint32_t sign = harness::Bits<uint32_t>(value) >> 16 & 0x8000;
        float size = std::fabs(value);
        if (std::isnan(value)) {
            bits = 0x7e00;
        } else if (size >= 65520.0f) {
            bits = static_cast<uint16_t>(sign | 0x7bff);
        } else if (size < 0x1p-14f) {
            bits = static_cast<uint16_t>(sign | static_cast<uint32_t>(std::nearbyint(size * 0x1p24f)));
        } else {
            uint32_t wide = harness::Bits<uint32_t>(size) - (112u << 23);
            bits = static_cast<uint16_t>(sign | (wide + 0xfff + (wide >> 13 & 1)) >> 13);
        }
    }
    operator float() const
    {
        uint32_t exponent = bits >> 10 & 31, fraction = bits & 1023;
        float size = exponent == 0    ? static_cast<float>(fraction) * 0x1p-24f
                     : exponent == 31 ? (fraction != 0 ? NAN : INFINITY)
                                      : std::ldexp(static_cast<float>(fraction | 1024), static_cast<int>(exponent) - 25);
        return bits & 0x8000 ? -size : size;
    }
};

struct bfloat16_t {
    uint16_t bits = 0;
    bfloat16_t() = default;
    bfloat16_t(float value)
    {
        uint32_t wide = harness::Bits<uint32_t>(value);
        bits = static_cast<uint16_t>(std::isnan(value) ? 0x7fc0 : (wide + 0x7fff + (wide >> 16 & 1)) >> 16);
    }
    operator float() const { return harness::Bits<float>(static_cast<uint32_t>(bits) << 16); }
};

namespace AscendC {

using harness::Fail;

enum class TPosition { VECIN, VECCALC, VECOUT };
enum class RoundMode { CAST_NONE, CAST_RINT, CAST_FLOOR, CAST_CEIL, CAST_ROUND, CAST_TRUNC };

template <typename A, typename B> struct IsSameType : std::is_same<A, B> {};

inline uint32_t GetBlockIdx() { return harness::block; }
inline uint32_t GetBlockNum() { return harness::blocks; }

template <typename From, typename To, RoundMode mode> To ScalarCast(From value)
{
    static_assert(std::is_same_v<From, float> && std::is_same_v<To, int32_t> && mode == RoundMode::CAST_FLOOR);
    ++harness::counts.conversions;
    return static_cast<To>(std::floor(value));
}

// A piece of UB. One that belongs to a queue goes round: free, allocated, queued, taken, free.
enum class State { FREE, ALLOCATED, QUEUED, TAKEN };
inline const char *Name(State state)
{
    const char *names[] = {"free", "allocated and not enqueued", "enqueued and not dequeued", "dequeued"};
    return names[static_cast<int>(state)];
}

struct Buffer {
    TPosition position;
    uint32_t offset, bytes;
    const void *queue;  // null for a TBuf
    State state = State::FREE;
    uint32_t generation = 0;  // a tensor of an earlier AllocTensor is out of date
};

struct UnifiedBuffer {
    alignas(32) uint8_t memory[256 * 1024];
    uint8_t written[256 * 1024];
};
inline UnifiedBuffer ub;

template <typename T> class LocalTensor {
public:
    LocalTensor() = default;
    LocalTensor(Buffer *owner) : buffer(owner), generation(owner->generation) {}

    LocalTensor operator[](uint32_t elements) const
    {
        LocalTensor part = *this;
        part.start += elements * sizeof(T);
        return part;
    }

    // The checked address of `bytes` bytes, which are going to be read or written by the vector unit or by a copy.
    T *Use(const char *what, uint64_t bytes, bool writes, bool copy) const
    {
        if (buffer == nullptr) {
            Fail("tensor without a buffer", "%s", what);
        }
        if (buffer->queue != nullptr && generation != buffer->generation) {
            Fail("tensor used after FreeTensor", "%s", what);
        }
        if ((buffer->offset + start) % 32 != 0) {
            Fail("misaligned", "%s: address %u in UB is no multiple of 32", what, buffer->offset + start);
        }
        if (start + bytes > buffer->bytes) {
            Fail("buffer overrun", "%s: bytes %u to %llu of a buffer of %u", what, start,
                 static_cast<unsigned long long>(start + bytes), buffer->bytes);
        }
        if (copy && buffer->position != (writes ? TPosition::VECIN : TPosition::VECOUT)) {
            Fail("wrong position", "%s: a copy from global memory goes to VECIN, one to global memory comes from VECOUT", what);
        }
        // Whoever fills a queue's buffer does so before EnQue, whoever consumes it after DeQue.
        bool fills = buffer->position == TPosition::VECIN ? copy : !copy;
        State needed = fills ? State::ALLOCATED : State::TAKEN;
        if (buffer->queue != nullptr && buffer->state != needed) {
            Fail("queue discipline", "%s: the buffer is %s, it has to be %s", what, Name(buffer->state), Name(needed));
        }
        uint8_t *written = ub.written + buffer->offset + start;
        if (writes) {
            std::memset(written, 1, bytes);
        } else if (std::memchr(written, 0, bytes) != nullptr) {
            Fail("uninitialised", "%s reads what nothing wrote", what);
        }
        return reinterpret_cast<T *>(ub.memory + buffer->offset + start);
    }

    Buffer *buffer = nullptr;
    uint32_t start = 0, generation = 0;
};

template <typename T> class GlobalTensor {
public:
    void SetGlobalBuffer(T *address, uint64_t elements)
    {
        harness::RegionOf(address, elements * sizeof(T));
        begin = address;
        size = elements;
    }
    GlobalTensor operator[](uint64_t elements) const
    {
        GlobalTensor part = *this;
        part.offset += elements;
        return part;
    }
    T GetValue(uint64_t index) const
    {
        ++harness::counts.scalarLoads;
        harness::ReadGlobal(At(index * sizeof(T), sizeof(T)), sizeof(T));
        return begin[offset + index];
    }
    uint8_t *At(uint64_t byte, uint64_t bytes) const
    {
        if (offset * sizeof(T) + byte + bytes > size * sizeof(T)) {
            Fail("global memory out of range", "byte %llu of an array of %llu elements",
                 static_cast<unsigned long long>(offset * sizeof(T) + byte + bytes), static_cast<unsigned long long>(size));
        }
        return reinterpret_cast<uint8_t *>(begin + offset) + byte;
    }

private:
    T *begin = nullptr;
    uint64_t offset = 0, size = 0;
};

// A TPosition has eight events, so at most eight buffers in queues; a kernel at most 64 buffers.
class TPipe {
public:
    TPipe() { std::memset(ub.written, 0, sizeof ub.written); }
    ~TPipe()
    {
        for (const Buffer &buffer : buffers) {
            if (buffer.queue != nullptr && buffer.state != State::FREE) {
                Fail("queue discipline", "at the end a buffer is %s, it was never freed", Name(buffer.state));
            }
        }
    }
    template <typename Queue> bool InitBuffer(Queue &queue, uint8_t number, uint32_t bytes)
    {
        uint32_t inQueues = number;
        for (const Buffer &buffer : buffers) {
            inQueues += buffer.queue != nullptr && buffer.position == Queue::POSITION;
        }
        if (inQueues > 8) {
            Fail("too many buffers", "%u in the queues of one TPosition", inQueues);
        }
        for (uint8_t i = 0; i < number; ++i) {
            queue.buffers.push_back(Add(Queue::POSITION, bytes, &queue));
        }
        return true;
    }
    template <typename Buf> bool InitBuffer(Buf &buf, uint32_t bytes)
    {
        buf.buffer = Add(Buf::POSITION, bytes, nullptr);
        return true;
    }

private:
    Buffer *Add(TPosition position, uint32_t bytes, const void *queue)
    {
        uint32_t size = (bytes + 31) / 32 * 32;
        if (used + static_cast<uint64_t>(size) > harness::ubBytes || bytes == 0) {
            Fail("UB overflow", "%u bytes for a buffer, %u of %llu are taken", bytes, used,
                 static_cast<unsigned long long>(harness::ubBytes));
        }
        if (buffers.size() == 64) {
            Fail("too many buffers", "more than 64");
        }
        buffers.push_back({position, used, size, queue});
        used += size;
        harness::counts.ubPeak = used > harness::counts.ubPeak ? used : harness::counts.ubPeak;
        return &buffers.back();
    }
    std::deque<Buffer> buffers;
    uint32_t used = 0;
};

template <TPosition position, int32_t depth> class TQue {
public:
    static constexpr TPosition POSITION = position;

    template <typename T> LocalTensor<T> AllocTensor()
    {
        for (Buffer *buffer : buffers) {
            if (buffer->state == State::FREE) {
                buffer->state = State::ALLOCATED;
                ++buffer->generation;
                std::memset(ub.written + buffer->offset, 0, buffer->bytes);
                return LocalTensor<T>(buffer);
            }
        }
        Fail("queue discipline", "AllocTensor: none of the queue's %zu buffers is free", buffers.size());
    }
    template <typename T> bool EnQue(const LocalTensor<T> &tensor)
    {
        Change(tensor, "EnQue", State::ALLOCATED, State::QUEUED);
        if (queued.size() == static_cast<size_t>(depth)) {
            Fail("queue depth exceeded", "EnQue into a queue of depth %d that is full", depth);
        }
        queued.push_back(tensor.buffer);
        return true;
    }
    template <typename T> LocalTensor<T> DeQue()
    {
        if (queued.empty()) {
            Fail("queue discipline", "DeQue of an empty queue");
        }
        LocalTensor<T> tensor(queued.front());
        queued.pop_front();
        Change(tensor, "DeQue", State::QUEUED, State::TAKEN);
        return tensor;
    }
    template <typename T> void FreeTensor(const LocalTensor<T> &tensor)
    {
        Change(tensor, "FreeTensor", State::TAKEN, State::FREE);
        ++tensor.buffer->generation;
    }

    std::vector<Buffer *> buffers;

private:
    template <typename T> void Change(const LocalTensor<T> &tensor, const char *what, State from, State to)
    {
        if (tensor.buffer == nullptr || tensor.buffer->queue != this || tensor.generation != tensor.buffer->generation) {
            Fail("queue discipline", "%s: the tensor is not one that this queue has handed out", what);
        }
        if (tensor.buffer->state != from) {
            Fail("queue discipline", "%s: the buffer is %s, it has to be %s", what, Name(tensor.buffer->state), Name(from));
        }
        tensor.buffer->state = to;
    }
    std::deque<Buffer *> queued;
};

template <TPosition position> class TBuf {
public:
    static constexpr TPosition POSITION = position;
    template <typename T> LocalTensor<T> Get() const
    {
        if (buffer == nullptr) {
            Fail("tensor without a buffer", "TBuf::Get before InitBuffer");
        }
        return LocalTensor<T>(buffer);
    }
    Buffer *buffer = nullptr;
};

// Strides are gaps between the end of a block and the start of the next: bytes in global memory, blocks of 32 bytes in UB.
struct DataCopyExtParams {
    uint16_t blockCount = 1;
    uint32_t blockLen = 0, srcStride = 0, dstStride = 0, rsv = 0;
};
template <typename T> struct DataCopyPadExtParams {
    bool isPad = false;
    uint8_t leftPadding = 0, rightPadding = 0;
    T paddingValue{};
};

inline void CountCopy(const DataCopyExtParams &copy, uint64_t element, uint64_t &bytes)
{
    if (copy.blockCount > 4095 || copy.blockLen > 2097151 || copy.blockLen % element != 0) {
        Fail("copy parameters", "blockCount %u, blockLen %u, elements of %llu bytes", copy.blockCount, copy.blockLen,
             static_cast<unsigned long long>(element));
    }
    bytes += static_cast<uint64_t>(copy.blockCount) * copy.blockLen;
    harness::counts.bursts += copy.blockCount;
    ++harness::counts.copies;
}

template <typename T>
void DataCopyPad(const LocalTensor<T> &dst, const GlobalTensor<T> &src, const DataCopyExtParams &copy,
                 const DataCopyPadExtParams<T> &pad)
{
    CountCopy(copy, sizeof(T), harness::counts.bytesIn);
    if (pad.leftPadding * sizeof(T) > 32 || pad.rightPadding * sizeof(T) > 32) {
        Fail("copy parameters", "padding of %u and %u elements is more than 32 bytes", pad.leftPadding, pad.rightPadding);
    }
    uint32_t left = pad.leftPadding, length = copy.blockLen / sizeof(T);
    uint32_t row = (left + length + pad.rightPadding) * sizeof(T);
    row = (row + 31) / 32 * 32;
    for (uint32_t i = 0; i < copy.blockCount && length > 0; ++i) {
        const uint8_t *from = src.At(static_cast<uint64_t>(i) * (copy.blockLen + copy.srcStride), copy.blockLen);
        harness::ReadGlobal(from, copy.blockLen);
        T *to = dst[i * (row + copy.dstStride * 32) / sizeof(T)].Use("DataCopyPad to UB", row, true, true);
        T fill = pad.isPad ? pad.paddingValue : *reinterpret_cast<const T *>(from);
        for (uint32_t j = 0; harness::arithmetic && j < row / sizeof(T); ++j) {
            to[j] = j >= left && j < left + length ? reinterpret_cast<const T *>(from)[j - left] : fill;
        }
    }
}

template <typename T> void DataCopyPad(const GlobalTensor<T> &dst, const LocalTensor<T> &src, const DataCopyExtParams &copy)
{
    CountCopy(copy, sizeof(T), harness::counts.bytesOut);
    uint32_t row = (copy.blockLen + 31) / 32 * 32;
    for (uint32_t i = 0; i < copy.blockCount && copy.blockLen > 0; ++i) {
        T *from = src[i * (row + copy.srcStride * 32) / sizeof(T)].Use("DataCopyPad from UB", row, false, true);
        uint8_t *to = dst.At(static_cast<uint64_t>(i) * (copy.blockLen + copy.dstStride), copy.blockLen);
        harness::WriteGlobal(to, copy.blockLen);
        if (harness::arithmetic) {
            std::memcpy(to, from, copy.blockLen);
        }
    }
}

inline DataCopyExtParams Contiguous(uint32_t bytes)
{
    if (bytes % 32 != 0) {
        Fail("misaligned", "DataCopy of %u bytes, no multiple of 32", bytes);
    }
    return {1, bytes, 0, 0, 0};
}
template <typename T> void DataCopy(const LocalTensor<T> &dst, const GlobalTensor<T> &src, uint32_t elements)
{
    DataCopyPad(dst, src, Contiguous(elements * sizeof(T)), DataCopyPadExtParams<T>{});
}
template <typename T> void DataCopy(const GlobalTensor<T> &dst, const LocalTensor<T> &src, uint32_t elements)
{
    DataCopyPad(dst, src, Contiguous(elements * sizeof(T)));
}

inline void CountVector(uint64_t elements, uint64_t widest)
{
    ++harness::counts.instructions;
    harness::counts.elements += elements;
    harness::counts.vectorBytes += (elements * widest + 255) / 256 * 256;
}

template <typename D, typename S, typename Function>
void Unary(const char *what, const LocalTensor<D> &dst, const LocalTensor<S> &src, uint32_t count, bool reads, Function function)
{
    CountVector(count, sizeof(D) > sizeof(S) ? sizeof(D) : sizeof(S));
    const S *from = src.Use(what, static_cast<uint64_t>(count) * sizeof(S), false, false);
    if (reads) {
        dst.Use(what, static_cast<uint64_t>(count) * sizeof(D), false, false);
    }
    D *to = dst.Use(what, static_cast<uint64_t>(count) * sizeof(D), true, false);
    auto *a = reinterpret_cast<const uint8_t *>(from), *b = reinterpret_cast<const uint8_t *>(to);
    bool same = a == b && sizeof(D) == sizeof(S);
    if (!same && a < b + static_cast<uint64_t>(count) * sizeof(D) && b < a + static_cast<uint64_t>(count) * sizeof(S)) {
        Fail("overlap", "%s: source and destination overlap in part", what);
    }
    for (uint32_t i = 0; harness::arithmetic && i < count; ++i) {
        to[i] = function(to[i], from[i]);
    }
}

template <typename T> void Muls(const LocalTensor<T> &dst, const LocalTensor<T> &src, const T &scalar, int32_t count)
{
    static_assert(std::is_same_v<T, float> || std::is_same_v<T, half>, "Muls takes no bfloat16");
    Unary("Muls", dst, src, count, false, [&](T, T x) { return T(x * scalar); });
}

template <typename T, typename U> void Axpy(const LocalTensor<T> &dst, const LocalTensor<U> &src, const U &scalar, int32_t count)
{
    static_assert((std::is_same_v<T, float> || std::is_same_v<T, half>) && (std::is_same_v<U, T> || std::is_same_v<U, half>),
                  "Axpy takes float32, float16, or float16 into float32");
    Unary("Axpy", dst, src, count, true, [&](T y, U x) { return T(y + x * scalar); });
}

template <typename T, typename U> void Cast(const LocalTensor<T> &dst, const LocalTensor<U> &src, RoundMode mode, uint32_t count)
{
    constexpr bool widens = std::is_same_v<T, float> && (std::is_same_v<U, half> || std::is_same_v<U, bfloat16_t>);
    constexpr bool narrows = std::is_same_v<U, float> && (std::is_same_v<T, half> || std::is_same_v<T, bfloat16_t>);
    static_assert(widens || narrows, "only float32 to and from 16-bit numbers");
    if (mode != (widens ? RoundMode::CAST_NONE : RoundMode::CAST_RINT)) {
        Fail("round mode", "Cast: CAST_NONE to float32, CAST_RINT from float32");
    }
    Unary("Cast", dst, src, count, false, [](T, U x) { return T(static_cast<float>(x)); });
}

template <typename T> void Duplicate(const LocalTensor<T> &dst, const T &scalar, int32_t count)
{
    CountVector(count, sizeof(T));
    T *to = dst.Use("Duplicate", static_cast<uint64_t>(count) * sizeof(T), true, false);
    for (int32_t i = 0; harness::arithmetic && i < count; ++i) {
        to[i] = scalar;
    }
}

}  // namespace AscendC
#endif
