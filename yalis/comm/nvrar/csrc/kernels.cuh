// The kernels of the CUDA library.
#pragma once

#include <cuda_runtime.h>

#include "direct.cuh"
#if defined(NVRAR_WITH_RELAY)
#include "relay.cuh"
#endif

namespace nvrar {

constexpr int kThreads = 512;  // most per block

struct Launch {
    DirectPeers peers;
    Layout layout;
    Topology world;
    uint32_t* epochs;
    const uint32_t* poison;
    HostWords* host;
    StampRing* stamps;  // null: off
    Args args;
};

template <class E, class Format, bool kPair, bool kNorm>
__global__ __launch_bounds__(kThreads, kPair && !kNorm && Format::kDense ? 2 : 1) void all_reduce(const __grid_constant__ Launch launch) {
    const uint32_t parts = kNorm ? launch.args.split.parts : 1;
    if (parts > 1) cluster_here();
    stream_order();
    DirectTransport transport(launch.peers, launch.world.rank(), launch.epochs, launch.poison, launch.host, parts);
    transport.stamp_with(launch.stamps);
    Exchange<E, Format, kPair, kNorm, DirectTransport>(transport, launch.world, launch.layout, launch.args, blockIdx.x)
        .run();
    transport.leave();
}

#if defined(NVRAR_WITH_RELAY)
// Always in cells and for any number of ranks.
template <class E, bool kNorm>
__global__ __launch_bounds__(kThreads, 1) void relayed_all_reduce(const __grid_constant__ Launch launch,
                                                                  const __grid_constant__ Relay relay) {
    const uint32_t parts = kNorm ? launch.args.split.parts : 1;
    if (parts > 1) cluster_here();
    stream_order();
    RelayTransport transport(relay, launch.peers, launch.world.rank(), launch.epochs, launch.poison, launch.host, parts);
    transport.stamp_with(launch.stamps);
    Exchange<E, Cells, false, kNorm, RelayTransport>(transport, launch.world, launch.layout, launch.args, blockIdx.x).run();
    transport.leave();
}
#endif

template <class E, class Format>
const void* kernel_of(bool pair, bool norm) {
    if (norm)
        return pair ? reinterpret_cast<const void*>(all_reduce<E, Format, true, true>)
                    : reinterpret_cast<const void*>(all_reduce<E, Format, false, true>);
    return pair ? reinterpret_cast<const void*>(all_reduce<E, Format, true, false>)
                : reinterpret_cast<const void*>(all_reduce<E, Format, false, false>);
}

template <class E>
const void* kernel_of(bool dense, bool pair, bool norm) {
    return dense ? kernel_of<E, Dense>(pair, norm) : kernel_of<E, Cells>(pair, norm);
}

}  // namespace nvrar
