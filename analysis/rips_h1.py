"""Exact H1 pairs of a Vietoris–Rips filtration over Z/2: the numba kernels behind ``analysis.persistence.h1``.

Persistent cohomology (de Silva, Morozov, Vejdemo-Johansson 2011) with apparent pairs (Bauer, "Ripser", 2021),
arranged around one observation: loops are born and die among the shortest edges.

1. ``_open_edges`` finds the edges whose lune is empty.  The lune of uv holds the vertices whose edges to u and to v
   both come before uv.  An edge with a non-empty lune is paired at once with a triangle of the same length, so only
   open edges can bear loops, and of those only the ones outside the minimum spanning tree.
2. ``_extend`` sorts the edges up to a cut-off, ranks them and lists each vertex's neighbours from near to far.  The
   cut-off starts low and rises only when a column is not finished below it; ranks already given never change.
3. ``_pairs`` reduces the coboundaries of the loop-bearing edges, longest first.  A column is a heap of cursors, each
   walking the cofacets of one edge in order, so a triangle is generated only when the reduction arrives at it.

Edges are ordered by (length, larger end, smaller end), so all ranks differ and ties need no care afterwards.  A
triangle is the integer ``rank of its longest edge << 32 | rank of the edge from that edge's larger end to the third
vertex``; triangles with the same longest edge are thereby ordered by that second edge.

Shapes: N vertices, M edges.
"""

from __future__ import annotations

import numpy as np
from numba import njit

NO_RANK = np.uint32(0xFFFFFFFF)
NO_KEY = np.uint64(0xFFFFFFFFFFFFFFFF)
MAX_VERTICES = 1 << 16

CENTRAL_PROBES = 4
NEAR_PROBES = 8
FIRST_SHARE = 0.08
GROWTH = 2.0

_CHUNK = 64
_RADIX_BITS = 11
_RADIX = 1 << _RADIX_BITS
_U16 = np.uint64(16)
_U32 = np.uint64(32)
_ONE = np.uint64(1)
_LOW16 = np.uint64(0xFFFF)
_LOW32 = np.uint64(0xFFFFFFFF)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # Fibonacci hashing


@njit(cache=True, nogil=True)
def _eccentricities(bits_NN):
    n = len(bits_NN)
    far_N = np.zeros(n, np.uint32)
    for i in range(n):
        row = bits_NN[i]
        far = np.uint32(0)
        for j in range(n):
            far = max(far, row[j])
        far_N[i] = far
    return far_N


@njit(cache=True, nogil=True)
def _any_within(row_u, row_v, start, stop, below_u, below_v):
    """Whether some w in [start, stop) has row_u[w] < below_u and row_v[w] < below_v."""
    w = start
    while w + _CHUNK <= stop:
        found = np.uint32(0)
        a = row_u[w : w + _CHUNK]
        b = row_v[w : w + _CHUNK]
        for t in range(_CHUNK):
            found |= np.uint32(a[t] < below_u) & np.uint32(b[t] < below_v)
        if found:
            return True
        w += _CHUNK
    for t in range(w, stop):  # noqa: SIM110 - numba compiles the loop, not the generator
        if row_u[t] < below_u and row_v[t] < below_v:
            return True
    return False


@njit(cache=True, nogil=True)
def _lune_is_empty(bits_NN, u, v):
    """Exact test for the edge u > v; equal lengths are settled by the order (larger end, smaller end)."""
    row_u = bits_NN[u]
    row_v = bits_NN[v]
    d = row_u[v]
    up_to = d + np.uint32(1)
    return not (
        _any_within(row_u, row_v, 0, v, up_to, up_to)
        or _any_within(row_u, row_v, v + 1, u, d, up_to)
        or _any_within(row_u, row_v, u + 1, len(row_u), d, d)
    )


@njit(cache=True, nogil=True)
def _nearest(row, u, count, out):
    """Write the `count` vertices nearest to u into out, by insertion; returns how many there are."""
    size = 0
    worst = NO_RANK
    for w in range(len(row)):
        d = row[w]
        if (size == count and d >= worst) or w == u:
            continue
        i = size if size < count else count - 1
        while i > 0 and row[out[i - 1]] > d:
            out[i] = out[i - 1]
            i -= 1
        out[i] = w
        size = min(size + 1, count)
        worst = row[out[size - 1]]
    return size


@njit(cache=True, nogil=True)
def _open_edges(bits_NN, central):
    """Keys (length, larger end, smaller end) of the edges with an empty lune, sorted.

    Probing a whole row against one vertex w is a vector loop, so a few likely witnesses (central vertices for long
    edges, u's nearest neighbours for short ones) clear nearly all edges before the exact test.
    """
    n = len(bits_NN)
    keys = np.empty(4 * n, np.uint64)
    size = 0
    clear = np.empty(n, np.uint32)
    near = np.empty(NEAR_PROBES, np.int64)
    for u in range(1, n):
        row_u = bits_NN[u]
        clear[:u] = 0
        probes = _nearest(row_u, u, NEAR_PROBES, near)
        for p in range(len(central) + probes):
            w = central[p] if p < len(central) else near[p - len(central)]
            row_w = bits_NN[w]
            d = row_u[w]
            for v in range(u):
                clear[v] |= np.uint32(max(d, row_w[v]) < row_u[v])
        for v in range(u):
            if clear[v] == 0 and _lune_is_empty(bits_NN, u, v):
                if size == len(keys):
                    keys = np.concatenate((keys, np.empty(size, np.uint64)))
                keys[size] = (np.uint64(row_u[v]) << _U32) | (np.uint64(u) << _U16) | np.uint64(v)
                size += 1
    return np.sort(keys[:size])


@njit(cache=True, nogil=True)
def _find(parent, a):
    while parent[a] != a:
        parent[a] = parent[parent[a]]
        a = parent[a]
    return a


@njit(cache=True, nogil=True)
def _off_tree(keys, n):
    """The keys that close a cycle, in order: Kruskal's algorithm, whose tree edges all have empty lunes."""
    parent = np.arange(n)
    out = np.empty_like(keys)
    size = 0
    for key in keys:
        a = _find(parent, np.int64((key >> _U16) & _LOW16))
        b = _find(parent, np.int64(key & _LOW16))
        if a == b:
            out[size] = key
            size += 1
        else:
            parent[a] = b
    return out[:size]


@njit(cache=True, nogil=True)
def _radix_sort(keys, spare):
    """Stable sort of keys by their upper 32 bits; `spare` is scratch of the same length."""
    m = len(keys)
    digit = np.uint64(_RADIX - 1)
    count = np.zeros((3, _RADIX), np.int64)
    for k in range(m):
        x = keys[k] >> _U32
        count[0, x & digit] += 1
        count[1, (x >> np.uint64(_RADIX_BITS)) & digit] += 1
        count[2, x >> np.uint64(2 * _RADIX_BITS)] += 1
    src = keys
    dst = spare
    swapped = False
    for p in range(3):
        place = count[p]
        if place.max() == m:
            continue
        total = 0
        for d in range(_RADIX):
            here = place[d]
            place[d] = total
            total += here
        shift = np.uint64(32 + _RADIX_BITS * p)
        for k in range(m):
            x = src[k]
            d = (x >> shift) & digit
            dst[place[d]] = x
            place[d] += 1
        src, dst = dst, src
        swapped = not swapped
    if swapped:
        keys[:] = src


@njit(cache=True, nogil=True)
def _cutoff(bits_NN, share):
    """An edge length below which lies about `share` of the edges, read off evenly spaced rows."""
    n = len(bits_NN)
    step = max(1, n // 48)
    sample = np.sort(bits_NN[::step].copy().ravel())
    return sample[min(len(sample) - 1, int(share * len(sample)))]


@njit(cache=True, nogil=True)
def _extend(bits_NN, above, up_to, keys_M, m, rank_NN, near_NN, degree_N):
    """Rank the edges with above < length <= up_to after the m ranked so far; returns the new count."""
    n = len(bits_NN)
    end = m
    for i in range(1, n):
        row = bits_NN[i]
        hi = np.uint64(i) << _U16
        for j in range(i):
            d = row[j]
            keys_M[end] = (np.uint64(d) << _U32) | hi | np.uint64(j)
            end += (np.int64(d) > above) & (d <= up_to)
    fresh = keys_M[m:end]
    _radix_sort(fresh, np.empty_like(fresh))
    for k in range(m, end):
        u = (keys_M[k] >> _U16) & _LOW16
        v = keys_M[k] & _LOW16
        rank_NN[u, v] = k
        rank_NN[v, u] = k
        near_NN[u, degree_N[u]] = v
        degree_N[u] += 1
        near_NN[v, degree_N[v]] = u
        degree_N[v] += 1
    return end


@njit(cache=True, nogil=True)
def _seek(near, rank, degree, at_least):
    """Position of the first listed neighbour whose rank is at_least or more."""
    lo = np.int64(0)
    hi = np.int64(degree)
    while lo < hi:
        mid = (lo + hi) >> 1
        if rank[near[mid]] < at_least:
            lo = mid + 1
        else:
            hi = mid
    return lo


@njit(cache=True, nogil=True)
def _next_in_lune(near_u, rank_u, rank_v, edge, i):
    """Position of u's next neighbour in the lune of `edge` from position i on; the edge's own when there is none."""
    while True:
        w = near_u[i]
        if rank_u[w] >= edge or rank_v[w] < edge:
            return i
        i += 1


CURSOR_EDGE, CURSOR_U, CURSOR_V, CURSOR_POS_U, CURSOR_POS_V = range(5)


@njit(cache=True, nogil=True)
def _advance(c, rank_NN, near_NN, degree_N):
    """The next cofacet of cursor c = (edge, u, v, position in near[u], position in near[v]); NO_KEY at the end.

    position in near[v] is -1 while the cursor is inside the edge's lune, where only u's list is walked.
    """
    edge = c[0]
    u = c[1]
    v = c[2]
    near_u = near_NN[u]
    near_v = near_NN[v]
    rank_u = rank_NN[u]
    rank_v = rank_NN[v]
    i = np.int64(c[3])
    j = np.int64(c[4])
    if j < 0:
        i = _next_in_lune(near_u, rank_u, rank_v, np.uint32(edge), i)
        r = rank_u[near_u[i]]
        c[3] = i + 1
        if r < edge:
            return (np.uint64(edge) << _U32) | np.uint64(r)
        i += 1
        j = _seek(near_v, rank_v, degree_N[v], np.uint32(edge)) + 1
    deg_u = degree_N[u]
    deg_v = degree_N[v]
    r_u = rank_u[near_u[i]] if i < deg_u else NO_RANK
    r_v = rank_v[near_v[j]] if j < deg_v else NO_RANK
    while True:
        if r_u < r_v:
            w = near_u[i]
            longest = r_u
            other = rank_v[w]
            i += 1
            r_u = rank_u[near_u[i]] if i < deg_u else NO_RANK
            end = u
        elif r_v < r_u:
            w = near_v[j]
            longest = r_v
            other = rank_u[w]
            j += 1
            r_v = rank_v[near_v[j]] if j < deg_v else NO_RANK
            end = v
        else:
            c[3] = i
            c[4] = j
            return NO_KEY
        if other < longest:
            c[3] = i
            c[4] = j
            second = np.uint32(edge) if end > w else other
            return (np.uint64(longest) << _U32) | np.uint64(second)


@njit(cache=True, nogil=True)
def _sift_down(key, owner, size, x, who):
    """Put (x, who) at the top hole of the min-heap key[:size]."""
    i = 0
    while True:
        low = 2 * i + 1
        if low >= size:
            break
        if low + 1 < size and key[low + 1] < key[low]:
            low += 1
        if key[low] >= x:
            break
        key[i] = key[low]
        owner[i] = owner[low]
        i = low
    key[i] = x
    owner[i] = who


@njit(cache=True, nogil=True)
def _sift_up(key, owner, size, x, who):
    """Push (x, who) on the min-heap key[:size]."""
    i = size
    while i > 0:
        up = (i - 1) >> 1
        if key[up] <= x:
            break
        key[i] = key[up]
        owner[i] = owner[up]
        i = up
    key[i] = x
    owner[i] = who


@njit(cache=True, nogil=True)
def _room(a, size):
    """a, or a longer copy when entry `size` does not fit."""
    if size < len(a):
        return a
    return np.concatenate((a, np.empty_like(a)))


@njit(cache=True, nogil=True)
def h1_pairs(bits_NN):
    """Births and deaths of all loops, zero-length ones included.

    bits_NN: uint32 [N, N], the bit patterns of a symmetric matrix of finite non-negative float32 with zero diagonal
        (non-negative floats order as their bit patterns do); 1 <= N <= MAX_VERTICES.
    Returns uint32 [K, 2], bit patterns of birth and death.
    """
    n = len(bits_NN)
    far_N = _eccentricities(bits_NN)
    radius = far_N.min()
    central = np.argsort(far_N)[:CENTRAL_PROBES]
    columns = _off_tree(_open_edges(bits_NN, central), n)
    n_columns = len(columns)
    pairs = np.empty((n_columns, 2), np.uint32)
    if n_columns == 0:
        return pairs

    longest_birth = np.uint32(columns[-1] >> _U32)
    share = FIRST_SHARE
    up_to = min(radius, max(longest_birth, _cutoff(bits_NN, share)))
    keys_M = np.empty(n * (n - 1) // 2 + 1, np.uint64)
    rank_NN = np.full((n, n), NO_RANK, np.uint32)
    near_NN = np.empty((n, n), np.uint16)
    degree_N = np.zeros(n, np.int64)
    m = _extend(bits_NN, -1, up_to, keys_M, 0, rank_NN, near_NN, degree_N)

    # pivot -> number of the column that owns it: open addressing, at most half full
    log = 4
    while (1 << log) < 2 * n_columns:
        log += 1
    slots = np.uint64((1 << log) - 1)
    shift = np.uint64(64 - log)
    table_key = np.full(1 << log, NO_KEY, np.uint64)
    table_column = np.empty(1 << log, np.int64)

    # reduced column c is the sum of the coboundaries of chain[start[c]:start[c + 1]]
    chain = np.empty(4 * n_columns + 64, np.uint32)
    start = np.zeros(n_columns + 1, np.int64)
    odd_M = np.zeros(len(keys_M), np.bool_)
    cursors = np.empty((256, 5), np.int64)
    heap_key = np.empty(256, np.uint64)
    heap_cursor = np.empty(256, np.int64)

    for done in range(n_columns):
        column = columns[n_columns - 1 - done]
        base = start[done]
        slot = np.uint64(0)
        pivot = NO_KEY
        used = base
        while True:
            edge = rank_NN[(column >> _U16) & _LOW16, column & _LOW16]
            size = 0
            live = 0
            used = base
            floor = np.uint64(edge) << _U32
            add_from = np.int64(-1)
            add_to = np.int64(-1)
            apparent = True
            pending = np.uint32(edge)
            apparent_pos = np.int64(-1)
            while True:
                # add the coboundary of one edge (the column's own, or an apparent one) or of a whole reduced column
                count = np.int64(1) if apparent else add_to - add_from
                for t in range(count):
                    e = pending if apparent else chain[add_from + t]
                    chain = _room(chain, used)
                    chain[used] = e
                    used += 1
                    if live == len(cursors):
                        cursors = np.concatenate((cursors, np.empty_like(cursors)))
                        heap_key = np.concatenate((heap_key, np.empty_like(heap_key)))
                        heap_cursor = np.concatenate((heap_cursor, np.empty_like(heap_cursor)))
                    c = cursors[live]
                    u = np.int64((keys_M[e] >> _U16) & _LOW16)
                    v = np.int64(keys_M[e] & _LOW16)
                    c[0] = e
                    c[1] = u
                    c[2] = v
                    floor_rank = np.uint32(floor >> _U32)
                    if apparent and apparent_pos >= 0:
                        c[3] = apparent_pos + 1
                        c[4] = -1
                    elif e > floor_rank:
                        c[3] = 0
                        c[4] = -1
                    elif e == floor_rank and not apparent:
                        c[3] = _seek(near_NN[u], rank_NN[u], degree_N[u], np.uint32(floor & _LOW32) + np.uint32(1))
                        c[4] = -1
                    else:
                        own = np.uint32(1) if e == floor_rank else np.uint32(0)
                        c[3] = _seek(near_NN[u], rank_NN[u], degree_N[u], floor_rank + own)
                        c[4] = _seek(near_NN[v], rank_NN[v], degree_N[v], floor_rank + own)
                    x = _advance(c, rank_NN, near_NN, degree_N)
                    while x <= floor:
                        x = _advance(c, rank_NN, near_NN, degree_N)
                    if x != NO_KEY:
                        _sift_up(heap_key, heap_cursor, size, x, live)
                        size += 1
                        live += 1
                # the pivot: the least triangle that an odd number of cursors point at
                pivot = NO_KEY
                while size > 0 and pivot == NO_KEY:
                    x = heap_key[0]
                    odd = False
                    while size > 0 and heap_key[0] == x:
                        odd = not odd
                        who = heap_cursor[0]
                        y = _advance(cursors[who], rank_NN, near_NN, degree_N)
                        if y == NO_KEY:
                            size -= 1
                            if size > 0:
                                _sift_down(heap_key, heap_cursor, size, heap_key[size], heap_cursor[size])
                        else:
                            _sift_down(heap_key, heap_cursor, size, y, who)
                    if odd:
                        pivot = x
                if pivot == NO_KEY:
                    break
                floor = pivot
                longest = np.uint32(pivot >> _U32)
                u = np.int64((keys_M[longest] >> _U16) & _LOW16)
                v = np.int64(keys_M[longest] & _LOW16)
                i = _next_in_lune(near_NN[u], rank_NN[u], rank_NN[v], longest, np.int64(0))
                if np.uint64(rank_NN[u, near_NN[u, i]]) == pivot & _LOW32:
                    apparent = True
                    pending = longest
                    apparent_pos = i
                    continue
                slot = (pivot * _GOLDEN) >> shift
                while table_key[slot] != pivot and table_key[slot] != NO_KEY:
                    slot = (slot + _ONE) & slots
                if table_key[slot] == NO_KEY:
                    break
                apparent = False
                add_from = start[table_column[slot]]
                add_to = start[table_column[slot] + 1]
            if pivot != NO_KEY:
                break
            if up_to >= radius:
                raise RuntimeError("a loop survives the enclosing radius: the matrix is not symmetric")
            share *= GROWTH
            above = np.int64(up_to)
            up_to = min(radius, max(up_to, _cutoff(bits_NN, share)))
            m = _extend(bits_NN, above, up_to, keys_M, m, rank_NN, near_NN, degree_N)
        for i in range(base, used):
            odd_M[chain[i]] ^= True
        keep = base
        for i in range(base, used):
            e = chain[i]
            if odd_M[e]:
                odd_M[e] = False
                chain[keep] = e
                keep += 1
        start[done + 1] = keep
        table_key[slot] = pivot
        table_column[slot] = done
        pairs[done, 0] = np.uint32(column >> _U32)
        pairs[done, 1] = np.uint32(keys_M[pivot >> _U32] >> _U32)
    return pairs
