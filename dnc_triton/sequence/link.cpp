// Links on a CPU, each read and written once a step: forward the new link and what is read from it, backward the
// adjoint of both. Compiled with NUMBER, float or double, READS, which is R, and CHUNK, the rows over which columns are
// added up at a time. Equations and letters are those of torch_memory.py; all is contiguous.

#include <cstdint>

typedef NUMBER Vector __attribute__((vector_size(64)));
typedef NUMBER Anywhere __attribute__((vector_size(64), aligned(sizeof(NUMBER)), may_alias));

constexpr int64_t LANES = sizeof(Vector) / sizeof(NUMBER);
constexpr int TOGETHER = 4;  // rows at a time: what belongs to a column is loaded once for all of them

namespace {  // another library, for other READS, has functions of the same names

// Prefetch what the next rows will read, or write: a row is too short for a processor to foresee it.
inline void expect_read(const NUMBER *place) { __builtin_prefetch(place, 0); }
inline void expect_write(const NUMBER *place) { __builtin_prefetch(place, 1); }

// Some columns of a row at once, or, at its end, one.
template <class V> struct Columns;

template <> struct Columns<Vector> {
    static Vector load(const NUMBER *from) { return *reinterpret_cast<const Anywhere *>(from); }
    static void store(NUMBER *to, Vector v) { *reinterpret_cast<Anywhere *>(to) = v; }
    static NUMBER sum(Vector v) {
        NUMBER total = 0;
        for (int64_t lane = 0; lane < LANES; ++lane) total += v[lane];
        return total;
    }
};

template <> struct Columns<NUMBER> {
    static NUMBER load(const NUMBER *from) { return *from; }
    static void store(NUMBER *to, NUMBER v) { *to = v; }
    static NUMBER sum(NUMBER v) { return v; }
};

// L'[i,j] = L + w[i] (p[j] − L) − w[j] L; the caller sets the diagonal to 0.
template <class V> V update(V link, NUMBER row_weight, V precedence, V weight) {
    return link + row_weight * (precedence - link) - weight * link;
}

// A batch element forward: sets the new link [N, N] and the forward weights [R, N]; the sums are the backward weights.
struct Forward {
    static constexpr int DOWN = READS;    // sums over the rows of a chunk, for each column
    static constexpr int ACROSS = READS;  // sums over the columns, for each row
    static constexpr int OF_ROW = READS;  // numbers that belong to a row, besides its write weight

    int64_t slots;
    const NUMBER *link, *precedence, *write_weights, *read_weights;
    NUMBER *new_link, *forward;

    NUMBER of_row(int which, int64_t row) const { return read_weights[which * slots + row]; }

    template <class V, int ROWS>
    void columns(int64_t row, int64_t j, V number, const NUMBER (&write_weight)[ROWS],
                 const NUMBER (&reads)[ROWS][OF_ROW], V (&down)[DOWN], V (&across)[ROWS][ACROSS]) const {
        using At = Columns<V>;
        V p = At::load(precedence + j), w = At::load(write_weights + j), weights[READS];
        V before[ROWS];
        for (int r = 0; r < READS; ++r) weights[r] = At::load(read_weights + r * slots + j);
        for (int k = 0; k < ROWS; ++k) {
            int64_t place = (row + k) * slots + j;
            before[k] = At::load(link + place);
            expect_read(link + place + ROWS * slots);
            expect_write(new_link + place + ROWS * slots);
        }
        for (int k = 0; k < ROWS; ++k) {
            V next = update(before[k], write_weight[k], p, w);
            next = number == V{} + NUMBER(row + k) ? V{} : next;
            At::store(new_link + (row + k) * slots + j, next);
            for (int r = 0; r < READS; ++r) {
                down[r] += reads[k][r] * next;
                across[k][r] += weights[r] * next;
            }
        }
    }

    void finish(int which, int64_t row, NUMBER sum) const { forward[which * slots + row] = sum; }
};

// A batch element backward, `linked` being [df | w_r | db], [3R, N]: turns the adjoint of the new link into that of the
// link before it; sets the rows' parts of d_read_weights [R, N] and d_write_weights [N]. The sums are the columns' part
// of d_read_weights; what is to be subtracted from d_write_weights; d_precedence.
struct Backward {
    static constexpr int DOWN = READS + 2;
    static constexpr int ACROSS = READS + 1;
    static constexpr int OF_ROW = 2 * READS;

    int64_t slots;
    const NUMBER *link, *precedence, *write_weights, *linked;
    NUMBER *d_link, *d_read_weights, *d_write_weights;

    NUMBER of_row(int which, int64_t row) const { return linked[which * slots + row]; }

    template <class V, int ROWS>
    void columns(int64_t row, int64_t j, V number, const NUMBER (&write_weight)[ROWS],
                 const NUMBER (&left)[ROWS][OF_ROW], V (&down)[DOWN], V (&across)[ROWS][ACROSS]) const {
        using At = Columns<V>;
        V p = At::load(precedence + j), w = At::load(write_weights + j), right[2 * READS];
        for (int r = 0; r < 2 * READS; ++r) right[r] = At::load(linked + (READS + r) * slots + j);
        for (int k = 0; k < ROWS; ++k) {
            int64_t place = (row + k) * slots + j;
            V before = At::load(link + place), d = At::load(d_link + place);
            expect_read(link + place + ROWS * slots);
            expect_write(d_link + place + ROWS * slots);
            for (int r = 0; r < 2 * READS; ++r) d += left[k][r] * right[r];
            V next = update(before, write_weight[k], p, w);
            auto diagonal = number == V{} + NUMBER(row + k);
            next = diagonal ? V{} : next;
            d = diagonal ? V{} : d;
            for (int r = 0; r < READS; ++r) {
                down[r] += left[k][r] * next;
                across[k][r] += right[READS + r] * next;
            }
            down[READS] += d * before;
            down[READS + 1] += write_weight[k] * d;
            across[k][READS] += d * (p - before);
            At::store(d_link + place, d * (1 - write_weight[k] - w));
        }
    }

    void finish(int which, int64_t row, NUMBER sum) const {
        (which < READS ? d_read_weights + which * slots : d_write_weights)[row] = sum;
    }
};

template <class Pass, class V, int ROWS>
void add_columns(const Pass &pass, NUMBER *sums, int64_t row, int64_t j, V number, const NUMBER (&write_weight)[ROWS],
                 const NUMBER (&of_row)[ROWS][Pass::OF_ROW], V (&across)[ROWS][Pass::ACROSS]) {
    V down[Pass::DOWN];
    for (int s = 0; s < Pass::DOWN; ++s) down[s] = Columns<V>::load(sums + s * pass.slots + j);
    pass.template columns<V, ROWS>(row, j, number, write_weight, of_row, down, across);
    for (int s = 0; s < Pass::DOWN; ++s) Columns<V>::store(sums + s * pass.slots + j, down[s]);
}

template <int ROWS, class Pass> void rows(const Pass &pass, NUMBER *sums, int64_t row) {
    NUMBER write_weight[ROWS], of_row[ROWS][Pass::OF_ROW], rest[ROWS][Pass::ACROSS] = {};
    for (int k = 0; k < ROWS; ++k) {
        write_weight[k] = pass.write_weights[row + k];
        for (int which = 0; which < Pass::OF_ROW; ++which) of_row[k][which] = pass.of_row(which, row + k);
    }
    Vector across[ROWS][Pass::ACROSS] = {}, number = {};
    for (int64_t lane = 0; lane < LANES; ++lane) number[lane] = lane;
    int64_t j = 0;
    for (; j + LANES <= pass.slots; j += LANES, number += NUMBER(LANES))
        add_columns<Pass, Vector, ROWS>(pass, sums, row, j, number, write_weight, of_row, across);
    for (; j < pass.slots; ++j)
        add_columns<Pass, NUMBER, ROWS>(pass, sums, row, j, NUMBER(j), write_weight, of_row, rest);
    for (int k = 0; k < ROWS; ++k)
        for (int which = 0; which < Pass::ACROSS; ++which)
            pass.finish(which, row + k, Columns<Vector>::sum(across[k][which]) + rest[k][which]);
}

// The rows of a chunk, whose sums over rows [DOWN, N] begin at 0.
template <class Pass> void chunk(const Pass &pass, NUMBER *sums, int64_t first) {
    int64_t row = first, end = first + CHUNK < pass.slots ? first + CHUNK : pass.slots;
    for (int64_t place = 0; place < Pass::DOWN * pass.slots; ++place) sums[place] = 0;
    for (; row + TOGETHER <= end; row += TOGETHER) rows<TOGETHER>(pass, sums, row);
    for (; row < end; ++row) rows<1>(pass, sums, row);
}

// All rows of all batch elements, pass_of(b) of each; then take(b, place, total) for each of its sums [DOWN, N].
template <class PassOf, class Take>
void run(int64_t threads, int64_t batch, int64_t slots, NUMBER *sums, const PassOf &pass_of, const Take &take) {
    using Pass = decltype(pass_of(0));
    const int64_t chunks = (slots + CHUNK - 1) / CHUNK, size = Pass::DOWN * slots;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for collapse(2)
        for (int64_t b = 0; b < batch; ++b)
            for (int64_t c = 0; c < chunks; ++c) chunk(pass_of(b), sums + (b * chunks + c) * size, c * CHUNK);
#pragma omp for collapse(2)
        for (int64_t b = 0; b < batch; ++b)
            for (int64_t place = 0; place < size; ++place) {
                NUMBER total = 0;
                for (int64_t c = 0; c < chunks; ++c) total += sums[(b * chunks + c) * size + place];
                take(b, place, total);
            }
    }
}

}  // namespace

// sums: [B, chunks, READS, N]. link to new_link: [B, N, N]. precedence, write_weights: [B, N]. Others: [B, R, N].
extern "C" void link_forward(int64_t threads, int64_t batch, int64_t slots, NUMBER *sums, const NUMBER *link,
                             const NUMBER *precedence, const NUMBER *write_weights, const NUMBER *read_weights,
                             NUMBER *new_link, NUMBER *backward, NUMBER *forward) {
    const int64_t square = slots * slots, heads = READS * slots;
    auto pass_of = [=](int64_t b) {
        return Forward{slots,
                       link + b * square,
                       precedence + b * slots,
                       write_weights + b * slots,
                       read_weights + b * heads,
                       new_link + b * square,
                       forward + b * heads};
    };
    run(threads, batch, slots, sums, pass_of,
        [=](int64_t b, int64_t place, NUMBER total) { backward[b * heads + place] = total; });
}

// sums: [B, chunks, READS + 2, N]. linked: [B, 3R, N]. d_write_weights, d_precedence: [B, N]. Others as above.
extern "C" void link_backward(int64_t threads, int64_t batch, int64_t slots, NUMBER *sums, const NUMBER *link,
                              const NUMBER *precedence, const NUMBER *write_weights, const NUMBER *linked,
                              NUMBER *d_link, NUMBER *d_read_weights, NUMBER *d_write_weights, NUMBER *d_precedence) {
    const int64_t square = slots * slots, heads = READS * slots;
    auto pass_of = [=](int64_t b) {
        return Backward{slots,
                        link + b * square,
                        precedence + b * slots,
                        write_weights + b * slots,
                        linked + 3 * b * heads,
                        d_link + b * square,
                        d_read_weights + b * heads,
                        d_write_weights + b * slots};
    };
    run(threads, batch, slots, sums, pass_of, [=](int64_t b, int64_t place, NUMBER total) {
        if (place < heads)
            d_read_weights[b * heads + place] += total;
        else if (place < heads + slots)
            d_write_weights[b * slots + place - heads] -= total;
        else
            d_precedence[b * slots + place - heads - slots] = total;
    });
}
