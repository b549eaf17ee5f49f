// Counters by which the blocks of a launch agree without another launch: who comes last, and adds what the others left;
// what is taken already. A kernel finds them zero and leaves them zero.
#pragma once

namespace peftcore {

constexpr int kMostTickets = 512;

}  // namespace peftcore

// `count` counters of the current device for a launch on `stream`, a cudaStream_t, that no other launch uses at the same
// time: those of a stream run one behind the other and share theirs; one captured into a graph, which may run beside any,
// keeps its own for good. nullptr where there are none left, or more than kMostTickets: the caller does without.
extern "C" unsigned* peftcore_tickets(int count, void* stream);
