"""Exact H1 pairs of a Vietoris–Rips filtration over Z/2: the numba kernels behind ``analysis.topology.persistence.h1``.

Persistent cohomology (de Silva, Morozov, Vejdemo-Johansson 2011) with apparent pairs (Bauer, "Ripser", 2021),
arranged so that work follows the reduction and little is enumerated or sorted in advance:

1. ``_open_edges`` finds the edges whose lune is empty.  The lune of uv holds the vertices whose edges to u and to v
   both come before uv.  An edge with a non-empty lune is paired at once with a triangle of the same length, so only
   open edges can bear loops, and of those only the ones outside the minimum spanning tree.
2. ``_rank_edges`` sorts and ranks the shortest edges, where nearly all loops live and die, and lists each vertex's
   neighbours from near to far.  The other edges are ranked only when a column is left unfinished.
3. ``h1_pairs`` reduces the coboundaries of the loop-bearing edges, longest first.  A column is a heap of cursors,
   each walking the cofacets of one edge in order by merging the neighbour lists of its two ends, so a triangle is
   generated only when the reduction arrives at it.

Edges are ordered by (length, larger end, smaller end), so all ranks differ and equal lengths need no care.  A triangle
is the integer ``rank of its longest edge << 32 | rank of the edge from that edge's larger end to the third vertex``.

Shapes: N vertices, M edges, C cursors of the column being reduced.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

MAX_VERTICES = 1 << 16

CENTRAL_PROBES = 4
NEAR_PROBES = 8
FIRST_SHARE = 0.1
SAMPLED_ROWS = 16

_CHUNK = 64
_RADIX_BITS = 11
_RADIX = 1 << _RADIX_BITS
_U16 = np.uint64(16)
_U32 = np.uint64(32)
_ONE = np.uint64(1)
_LOW16 = np.uint64(0xFFFF)
_LOW32 = np.uint64(0xFFFFFFFF)
_NO_RANK = np.uint32(0xFFFFFFFF)
_NO_TRIANGLE = np.uint64(0xFFFFFFFFFFFFFFFF)
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
    worst = _NO_RANK
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
    """The edges with an empty lune, as integers (length, larger end, smaller end), in no order.

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
                    keys = _longer(keys)
                keys[size] = (np.uint64(row_u[v]) << _U32) | (np.uint64(u) << _U16) | np.uint64(v)
                size += 1
    return keys[:size]


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
def _rank_edges(bits_NN, above, up_to, edges_M, m, rank_NN):
    """Rank the edges with above < length <= up_to after the m ranked so far; returns the new count."""
    end = m
    for u in range(1, len(bits_NN)):
        row = bits_NN[u]
        for v in range(u):
            d = row[v]
            edges_M[end] = (np.uint64(d) << _U32) | (np.uint64(u) << _U16) | np.uint64(v)
            end += (np.int64(d) > above) & (d <= up_to)
    fresh = edges_M[m:end]
    _radix_sort(fresh, np.empty_like(fresh))
    for k in range(m, end):
        u, v = _ends(edges_M[k])
        rank_NN[u, v] = k
        rank_NN[v, u] = k
    return end


@njit(cache=True, nogil=True)
def _list_neighbours(edges_M, begin, end, near_NN, degree_N):
    """Append the neighbours over the edges of ranks begin..end - 1 to the lists, from near to far."""
    for k in range(begin, end):
        u, v = _ends(edges_M[k])
        near_NN[u, degree_N[u]] = v
        degree_N[u] += 1
        near_NN[v, degree_N[v]] = u
        degree_N[v] += 1


@njit(cache=True, nogil=True)
def _ends(edge):
    return np.int64((edge >> _U16) & _LOW16), np.int64(edge & _LOW16)


@njit(cache=True, nogil=True)
def _seek(near, rank, degree, at_least):
    """Position of the first of `degree` listed neighbours whose edge has rank at_least or more."""
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
    """Position of u's next neighbour in the lune of `edge` = uv from position i on; that of v when there is none."""
    while True:
        w = near_u[i]
        if rank_u[w] >= edge or rank_v[w] < edge:
            return i
        i += 1


@njit(cache=True, nogil=True)
def _advance(rank_NN, near_NN, degree_N, cursor):
    """The next cofacet of the cursor (edge, larger end u, smaller end v, position at u, position at v).

    Cofacets whose longest edge is the cursor's own come first, in the order of u's list; the position at v is -1
    meanwhile.  The others follow in the merged order of both lists.  No calls that can fail and no slow paths in
    here: this loop is most of the reduction.
    """
    edge = np.uint32(cursor[0])
    u = cursor[1]
    v = cursor[2]
    near_u = near_NN[u]
    near_v = near_NN[v]
    rank_u = rank_NN[u]
    rank_v = rank_NN[v]
    i = cursor[3]
    j = cursor[4]
    if j < 0:
        i = _next_in_lune(near_u, rank_u, rank_v, edge, i)
        r = rank_u[near_u[i]]
        i += 1
        cursor[3] = i
        if r < edge:
            return (np.uint64(edge) << _U32) | np.uint64(r)
        j = _seek(near_v, rank_v, degree_N[v], edge) + 1
    degree_u = degree_N[u]
    degree_v = degree_N[v]
    r_u = rank_u[near_u[i]] if i < degree_u else _NO_RANK
    r_v = rank_v[near_v[j]] if j < degree_v else _NO_RANK
    triangle = _NO_TRIANGLE
    while r_u != r_v:
        if r_u < r_v:
            w = near_u[i]
            longest = r_u
            other = rank_v[w]
            end = u
            i += 1
            r_u = rank_u[near_u[i]] if i < degree_u else _NO_RANK
        else:
            w = near_v[j]
            longest = r_v
            other = rank_u[w]
            end = v
            j += 1
            r_v = rank_v[near_v[j]] if j < degree_v else _NO_RANK
        if other < longest:
            triangle = (np.uint64(longest) << _U32) | np.uint64(edge if end > w else other)
            break
    cursor[3] = i
    cursor[4] = j
    return triangle


@njit(cache=True, nogil=True)
def _start(rank_NN, near_NN, degree_N, cursor, edge, u, v, after):
    """Set the cursor to the cofacets of `edge` = uv that come after the triangle `after`; returns the next one."""
    first = np.uint32(after >> _U32)
    cursor[0] = edge
    cursor[1] = u
    cursor[2] = v
    cursor[3] = 0
    cursor[4] = -1
    if edge == first:
        cursor[3] = _seek(near_NN[u], rank_NN[u], degree_N[u], np.uint32(after & _LOW32) + np.uint32(1))
    elif edge < first:
        cursor[3] = _seek(near_NN[u], rank_NN[u], degree_N[u], first)
        cursor[4] = _seek(near_NN[v], rank_NN[v], degree_N[v], first)
    triangle = _advance(rank_NN, near_NN, degree_N, cursor)
    if triangle <= after:
        triangle = _advance(rank_NN, near_NN, degree_N, cursor)
    return triangle


@njit(cache=True, nogil=True)
def _sift_down(heap_C, cursor_of_C, size, triangle, c):
    """Put (triangle, c) at the top hole of the min-heap heap_C[:size]."""
    i = 0
    while True:
        low = 2 * i + 1
        if low >= size:
            break
        if low + 1 < size and heap_C[low + 1] < heap_C[low]:
            low += 1
        if heap_C[low] >= triangle:
            break
        heap_C[i] = heap_C[low]
        cursor_of_C[i] = cursor_of_C[low]
        i = low
    heap_C[i] = triangle
    cursor_of_C[i] = c


@njit(cache=True, nogil=True)
def _sift_up(heap_C, cursor_of_C, size, triangle, c):
    """Push (triangle, c) on the min-heap heap_C[:size]."""
    i = size
    while i > 0:
        up = (i - 1) >> 1
        if heap_C[up] <= triangle:
            break
        heap_C[i] = heap_C[up]
        cursor_of_C[i] = cursor_of_C[up]
        i = up
    heap_C[i] = triangle
    cursor_of_C[i] = c


@njit(cache=True, nogil=True)
def _pop_pivot(rank_NN, near_NN, degree_N, cursor_C5, heap_C, cursor_of_C, size):
    """Move past the least triangle that an odd number of cursors point at; returns it and the new heap size."""
    while size > 0:
        pivot = heap_C[0]
        odd = False
        while size > 0 and heap_C[0] == pivot:
            odd = not odd
            c = cursor_of_C[0]
            triangle = _advance(rank_NN, near_NN, degree_N, cursor_C5[c])
            if triangle == _NO_TRIANGLE:
                size -= 1
                triangle = heap_C[size]
                c = cursor_of_C[size]
            if size > 0:
                _sift_down(heap_C, cursor_of_C, size, triangle, c)
        if odd:
            return pivot, size
    return _NO_TRIANGLE, size


@njit(cache=True, nogil=True)
def _cancel_pairs(chain, odd_M):
    """Keep one of each edge that occurs an odd number of times; returns their number. odd_M: all False, scratch."""
    for e in chain:
        odd_M[e] ^= True
    keep = 0
    for e in chain:
        if odd_M[e]:
            odd_M[e] = False
            chain[keep] = e
            keep += 1
    return keep


@njit(cache=True, nogil=True)
def _longer(a):
    """A copy of a with room for as many entries again."""
    b = np.empty(2 * len(a), a.dtype)
    b[: len(a)] = a
    return b


def h1_pairs(bits_NN: NDArray) -> NDArray:
    """Births and deaths of all loops, zero-length ones included.

    bits_NN: uint32 [N, N], the bit patterns of a symmetric matrix of finite non-negative float32 with zero diagonal
        (non-negative floats are ordered as their bit patterns are); 2 <= N <= MAX_VERTICES.
    Returns uint32 [K, 2], bit patterns of birth and death.
    """
    far_N = _eccentricities(bits_NN)
    radius = far_N.min()  # beyond the enclosing radius the complex is a cone
    open_edges = _open_edges(bits_NN, np.argsort(far_N)[:CENTRAL_PROBES])
    births = _off_tree(np.sort(open_edges), len(bits_NN))
    if len(births) == 0:
        return np.empty((0, 2), np.uint32)
    sample = bits_NN[:: max(1, len(bits_NN) // SAMPLED_ROWS)].ravel()
    at = int(FIRST_SHARE * len(sample))
    longest_birth = (births[-1] >> _U32).astype(np.uint32)
    return _reduce(bits_NN, births, min(radius, max(longest_birth, np.partition(sample, at)[at])), radius)


@njit(cache=True, nogil=True)
def _reduce(bits_NN, births, up_to, radius):
    """Reduce the coboundaries of the loop-bearing edges `births`, ranking edges up to `up_to` before the others."""
    n = len(bits_NN)
    n_births = len(births)
    pairs = np.empty((n_births, 2), np.uint32)
    edges_M = np.empty(n * (n - 1) // 2 + 1, np.uint64)
    rank_NN = np.full((n, n), _NO_RANK, np.uint32)
    near_NN = np.empty((n, n), np.uint16)
    degree_N = np.zeros(n, np.int64)
    m = _rank_edges(bits_NN, -1, up_to, edges_M, 0, rank_NN)
    _list_neighbours(edges_M, 0, m, near_NN, degree_N)

    # pivot -> number of the reduced column it belongs to: open addressing, at most half full
    log = 4
    while (1 << log) < 2 * n_births:
        log += 1
    mask = np.uint64((1 << log) - 1)
    shift = np.uint64(64 - log)
    table = np.full(1 << log, _NO_TRIANGLE, np.uint64)
    table_column = np.empty(1 << log, np.int64)

    # reduced column k is the sum of the coboundaries of the edges chain[start[k]:start[k + 1]]
    chain = np.empty(4 * n_births + 64, np.uint32)
    start = np.zeros(n_births + 1, np.int64)
    odd_M = np.zeros(len(edges_M), np.bool_)
    cursor_C5 = np.empty((256, 5), np.int64)
    heap_C = np.empty(256, np.uint64)
    cursor_of_C = np.empty(256, np.int64)

    for k in range(n_births):
        birth = births[n_births - 1 - k]
        edge = rank_NN[_ends(birth)]
        if len(chain) <= start[k]:  # columns that add nothing take a place each, too
            chain = _longer(chain)
        chain[start[k]] = edge
        used = start[k] + 1
        fresh = start[k]
        live = 0
        size = 0
        pivot = (np.uint64(edge) << _U32) | np.uint64(edge - 1)
        while True:
            # cursors for the edges just added to the chain
            while len(heap_C) < live + used - fresh:
                more_C5 = np.empty((2 * len(heap_C), 5), np.int64)
                more_C5[: len(heap_C)] = cursor_C5
                cursor_C5 = more_C5
                heap_C = _longer(heap_C)
                cursor_of_C = _longer(cursor_of_C)
            for t in range(fresh, used):
                u, v = _ends(edges_M[chain[t]])
                triangle = _start(rank_NN, near_NN, degree_N, cursor_C5[live], chain[t], u, v, pivot)
                if triangle != _NO_TRIANGLE:
                    _sift_up(heap_C, cursor_of_C, size, triangle, live)
                    size += 1
                    live += 1
            pivot, size = _pop_pivot(rank_NN, near_NN, degree_N, cursor_C5, heap_C, cursor_of_C, size)
            if pivot == _NO_TRIANGLE:
                # the column does not end among the edges ranked so far: rank the others and begin it again
                if up_to == radius:
                    raise RuntimeError("a loop outlives the enclosing radius: the matrix is not symmetric")
                ranked = m
                m = _rank_edges(bits_NN, np.int64(up_to), radius, edges_M, ranked, rank_NN)
                _list_neighbours(edges_M, ranked, m, near_NN, degree_N)
                up_to = radius
                used = start[k] + 1
                fresh = start[k]
                live = 0
                size = 0
                pivot = (np.uint64(edge) << _U32) | np.uint64(edge - 1)
                continue
            # the column to add: an apparent one, known by its lune, or one reduced before
            fresh = used
            longest = np.uint32(pivot >> _U32)
            u, v = _ends(edges_M[longest])
            i = _next_in_lune(near_NN[u], rank_NN[u], rank_NN[v], longest, 0)
            apparent = np.uint64(rank_NN[u, near_NN[u, i]]) == pivot & _LOW32
            first = fresh
            last = fresh + 1
            if not apparent:
                slot = (pivot * _GOLDEN) >> shift
                while table[slot] != _NO_TRIANGLE and table[slot] != pivot:
                    slot = (slot + _ONE) & mask
                if table[slot] == _NO_TRIANGLE:
                    table[slot] = pivot
                    table_column[slot] = k
                    break
                first = start[table_column[slot]]
                last = start[table_column[slot] + 1]
            used = fresh + last - first
            while len(chain) <= used:
                chain = _longer(chain)
            if apparent:
                chain[fresh] = longest
            else:
                chain[fresh:used] = chain[first:last]
        start[k + 1] = start[k] + _cancel_pairs(chain[start[k] : used], odd_M)
        pairs[k, 0] = np.uint32(birth >> _U32)
        pairs[k, 1] = np.uint32(edges_M[pivot >> _U32] >> _U32)
    return pairs
