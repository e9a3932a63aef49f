// How it is done, and why a row's bits depend on its own sequence alone.
//
// Keys come in tiles of kTile positions, counted from position 0. Within a tile a query's scores are one sum each, over
// d in order; the softmax is over the tile, its sums by lane and then by a fixed tree; each mixed value is one sum over
// the keys in order. Tiles are merged in order by their peaks (Milakov and Gimelshein, "Online normalizer calculation
// for softmax", 2018). So who computes a tile, beside which other queries, does not show. Keys that a query may not
// read have weight 0, which adds nothing to a sum: a block of rows goes as far as its longest row.
//
// A task is a tile of queries of one chunk (all query heads that share a key/value head), and one key/value head. Its
// rows are query by query, head by head. Keys are turned into columns, one to a lane, a panel at a time, and each
// panel meets all rows while it is in the first-level cache. With few rows (decode) panels are not worth making, and a
// chunk's KV tiles are spread over several tasks; the one that ends last merges.
#include "attention.h"

#include <algorithm>
#include <atomic>
#include <utility>
#include <vector>

#include "attention_products.h"
#include "pool.h"

namespace qwire {
namespace {

constexpr float kNoScore = -3.0e38f;  // finite, so that a row that has read nothing yet stays free of inf - inf
constexpr int kQueryRows = 192;       // rows of a unit: fewer repeat the packing, more leave the second-level cache
constexpr int kFewRows = 12;          // up to here values are read in place and KV tiles spread over tasks
constexpr int kTasksAThread = 8;
constexpr int64_t kQueriesAhead = 4;  // that are asked for before they are read: they lie too far apart for the processor to

// The keys of a tile that a row, or a block of rows, reads: [from, to), counted within the tile; none where from >= to.
struct Span {
    int from, to;
};

// A softmax before it is divided: weights relative to the peak, and their sum.
struct Soft {
    float peak, total;
};

// Scores to weights, in place; within [first, last), multiples of kLanes, what `span` leaves out becomes 0. Where keys and
// values are codes, a score is multiplied by its key's scale first, and in the end a weight by its value's. Where such
// codes are multiplied in fixed point, scores are sums that `unit` makes floats of, and weights become units; `unit` is
// then theirs.
template <class T>
__attribute__((noinline)) Soft soften(float* scores, Span span, int first, int last, const float* key_scales,
                                      const float* value_scales, [[maybe_unused]] float& unit) {
    constexpr bool scaled = kScaled<T>;
    i32v lanes;
    for (int i = 0; i < kLanes; ++i) lanes[i] = i;
    const auto read = [&](int k) { return (lanes + k >= span.from) & (lanes + k < span.to); };
    const int from = (span.from + kLanes - 1) / kLanes * kLanes, to = span.to / kLanes * kLanes;  // whole vectors
    f32v peaks = splat(kNoScore);
    for (int k = first; k < last; k += kLanes) {
        f32v score;
        if constexpr (kPaired<T>) score = __builtin_convertvector(load<i32v>(scores + k), f32v) * unit;
        else score = load<f32v>(scores + k);
        if constexpr (scaled) score *= load<f32v>(key_scales + k);
        if (k < from || k >= to) score = read(k) ? score : splat(kNoScore);
        if (scaled || k < from || k >= to) store(scores + k, score);
        peaks = max(score, peaks);
    }
    // Where nothing is read the peak is kNoScore itself, and weights are made 0 below.
    const float peak = max(peaks);
    f32v totals{};
    [[maybe_unused]] f32v largest{}, sums{};
    for (int k = first; k < last; k += kLanes) {
        f32v weight = exp(load<f32v>(scores + k) - peak);
        if (k < from || k >= to) weight = read(k) ? weight : f32v{};
        totals += weight;
        if constexpr (scaled) weight *= load<f32v>(value_scales + k);
        if constexpr (kPaired<T>) {  // scales of values that nobody reads may be NaN, and a unit may hold such a one
            if (k < from || k >= to) weight = read(k) ? weight : f32v{};
            largest = max(weight, largest);
            if (kSumsBound<T>) sums += weight;
        }
        store(scores + k, weight);
    }
    if constexpr (kPaired<T>)  // in place: what is written never passes what is read
        unit = fix<false>(scores + first, last - first, size_of<T>(max(largest), sum(sums)),
                          reinterpret_cast<int16_t*>(scores) + first);
    return {peak, sum(totals)};
}

// Takes the next tile's softmax and mixed values [dim] into those of the tiles before it.
__attribute__((noinline)) void merge(Soft& soft, float* mixed, Soft next, const float* next_mixed, int64_t dim) {
    const float peak = next.peak > soft.peak ? next.peak : soft.peak;
    f32v gap{};
    gap[0] = soft.peak - peak, gap[1] = next.peak - peak;
    const f32v fades = exp(gap);
    const f32v fade = splat(fades[0]), next_fade = splat(fades[1]);
    soft = {peak, fma(splat(soft.total), fade, next.total * next_fade)[0]};
    for (int64_t d = 0; d < dim; d += kLanes)
        store(mixed + d, fma(load<f32v>(mixed + d), fade, load<f32v>(next_mixed + d) * next_fade));
}

// Queries of one chunk, and the KV tiles that they read in one task.
struct Item {
    int64_t chunk, row, position;  // the first query's row of the step and position
    int64_t queries, first_tile, last_tile;
    int64_t part = -1;  // of a piece: the first row of its item in `part_mixed_`; -1: the item is whole
    int64_t group = 0, tiles_before = 0;
};

struct Scratch {
    const void** lines;  // addresses in the order of reading: a tile's keys, its values, kAhead keys of the next tile
    Span* spans;         // [rows]
    Soft* softs;         // [rows]
    Soft* tile_softs;    // [rows]
    float* panel;        // [kDepth, kPanel]; panels and queries as units of the cache's type
    float* queries;      // [rows, dim], scaled
    float* query_units;   // [rows]: what 1 of a fixed-point value stands for
    float* weight_units;  // [rows]: likewise, of the tile's weights
    float* scores;       // [rows, kTile], as sums of units, then weights, as units
    float* scales;       // [2, kTile]: the tile's keys' and values', where they are codes
    float* tile;         // [rows, dim]: one tile's mixed values
    float* mixed;        // [rows, dim]
};

class Attention {
   public:
    Attention(const float* queries, int64_t query_stride, int64_t q_heads, const PagedCache& cache,
              const RaggedChunks& chunks, int64_t window, float* out)
        : queries_(queries),
          query_stride_(query_stride),
          q_heads_(q_heads),
          group_(q_heads / cache.kv_heads),
          dim_(cache.head_dim),
          window_(window),
          cache_(cache),
          chunks_(chunks),
          out_(out) {}

    void run() {
        plan();
        with_type(cache_.type, [&](auto type) {
            using T = decltype(type);
            const int64_t tasks = int64_t(runs_.size()) - 1, threads = num_threads();
            parallel_for(tasks, [&](int64_t task) {
                const int64_t end = runs_[size_t(task) + 1];
                const int64_t after = runs_[size_t(std::min(task + threads, tasks))];  // of this thread's next task, likely
                for (int64_t unit = runs_[size_t(task)]; unit < end; ++unit) work<T>(unit, unit + 1 < end ? unit + 1 : after);
            });
        });
    }

   private:
    int64_t first_tile(int64_t position) const {
        return window_ ? std::max<int64_t>(0, position - window_ + 1) / kTile : 0;
    }

    void plan() {
        const int64_t most = std::max<int64_t>(1, kQueryRows / group_);
        int64_t row = 0, few_tiles = 0;
        for (int64_t chunk = 0; chunk < chunks_.count; ++chunk) {
            const int64_t start = chunks_.starts[chunk], length = chunks_.lengths[chunk];
            for (int64_t query = 0; query < length; query += most) {
                const int64_t queries = std::min(most, length - query), position = start + query;
                items_.push_back({chunk, row + query, position, queries, first_tile(position),
                                  (position + queries - 1) / kTile + 1});
                if (few(items_.back())) few_tiles += items_.back().last_tile - items_.back().first_tile;
            }
            row += length;
        }
        split(few_tiles);
        // The longest first: the last ones then leave no thread waiting for long.
        std::stable_sort(items_.begin(), items_.end(), [&](const Item& a, const Item& b) { return cost(a) > cost(b); });
        join();
    }

    // Runs of units (an item and a head) that make a task.
    void join() {
        int64_t total = 0, sum = 0;
        for (const Item& item : items_) total += cost(item) * cache_.kv_heads;
        const int64_t wanted = total / (kTasksAThread * num_threads());
        runs_.push_back(0);
        for (size_t i = 0; i < items_.size(); ++i) {
            for (int64_t head = 0; head < cache_.kv_heads; ++head) {
                sum += cost(items_[i]);
                if (sum < wanted) continue;
                runs_.push_back(int64_t(i) * cache_.kv_heads + head + 1);
                sum = 0;
            }
        }
        const int64_t units = int64_t(items_.size()) * cache_.kv_heads;
        if (runs_.back() < units) runs_.push_back(units);
    }

    bool few(const Item& item) const { return item.queries * group_ <= kFewRows; }

    int64_t cost(const Item& item) const { return (item.last_tile - item.first_tile) * (item.queries * group_ + 8); }

    // Cuts items of few rows into pieces of several tiles where there would be too few tasks for the threads.
    void split(int64_t few_tiles) {
        const int64_t tasks = kTasksAThread * num_threads();
        const int64_t most = std::max<int64_t>(1, (few_tiles * cache_.kv_heads + tasks - 1) / tasks);
        int64_t parts = 0, groups = 0;
        std::vector<Item> pieces;
        std::vector<int> counts;
        for (const Item& item : items_) {
            const int64_t tiles = item.last_tile - item.first_tile;
            if (!few(item) || tiles <= most) {
                pieces.push_back(item);
                continue;
            }
            for (int64_t tile = item.first_tile; tile < item.last_tile; tile += most) {
                Item piece = item;
                piece.first_tile = tile;
                piece.last_tile = std::min(item.last_tile, tile + most);
                piece.part = parts, piece.group = groups, piece.tiles_before = tile - item.first_tile;
                pieces.push_back(piece);
            }
            for (int64_t head = 0; head < cache_.kv_heads; ++head) counts.push_back(int((tiles + most - 1) / most));
            tiles_of_.push_back(tiles);
            parts += tiles * cache_.kv_heads * item.queries * group_;
            ++groups;
        }
        items_.swap(pieces);
        part_softs_.resize(size_t(parts));
        part_mixed_ = parts ? static_cast<float*>(scratch(3, parts * dim_ * int64_t(sizeof(float)))) : nullptr;
        waiting_ = std::vector<std::atomic<int>>(counts.size());
        for (size_t i = 0; i < counts.size(); ++i) waiting_[i].store(counts[i], std::memory_order_relaxed);
    }

    Scratch scratch_for(int64_t rows) const {
        const auto bytes = [](int64_t count, size_t size) { return (count * int64_t(size) + 63) / 64 * 64; };
        const int64_t lines = bytes(2 * kTile + kAhead, sizeof(void*)), panel = bytes(kDepth * kPanel, sizeof(float));
        const int64_t spans = bytes(rows, sizeof(Span)), softs = bytes(rows, sizeof(Soft));
        const int64_t scores = bytes(rows * kTile, sizeof(float)), mixed = bytes(rows * dim_, sizeof(float));
        const int64_t scales = bytes(2 * kTile, sizeof(float)), units = bytes(rows, sizeof(float));
        char* at =
            static_cast<char*>(scratch(0, lines + panel + spans + 2 * softs + scores + scales + 2 * units + 3 * mixed));
        const auto take = [&at](int64_t size) { return static_cast<void*>(std::exchange(at, at + size)); };
        Scratch s;
        s.lines = static_cast<const void**>(take(lines));
        s.panel = static_cast<float*>(take(panel));
        s.spans = static_cast<Span*>(take(spans));
        s.softs = static_cast<Soft*>(take(softs));
        s.tile_softs = static_cast<Soft*>(take(softs));
        s.queries = static_cast<float*>(take(mixed));
        s.query_units = static_cast<float*>(take(units));
        s.weight_units = static_cast<float*>(take(units));
        s.scores = static_cast<float*>(take(scores));
        s.scales = static_cast<float*>(take(scales));
        s.tile = static_cast<float*>(take(mixed));
        s.mixed = static_cast<float*>(take(mixed));
        return s;
    }

    // What queries [query, query + count) of an item read of a tile, one with another.
    Span span(const Item& item, int64_t tile, int64_t query, int64_t count) const {
        const int64_t first = item.position + query - tile * kTile, last = first + count;
        const int64_t from = window_ ? std::clamp<int64_t>(first - window_ + 1, 0, kTile) : 0;
        return {int(from), int(std::clamp<int64_t>(last, 0, kTile))};
    }

    template <class T>
    void work(int64_t unit, int64_t next_unit) const {
        const int64_t head = unit % cache_.kv_heads;
        const Item& item = items_[size_t(unit / cache_.kv_heads)];
        const int64_t rows = item.queries * group_;
        const Scratch s = scratch_for(rows);
        const f32v scale = splat(1.0f / __builtin_sqrtf(float(dim_)));
        for (int64_t query = 0, row = 0; query < item.queries; ++query) {
            const float* from = queries_ + (item.row + query) * query_stride_ + head * group_ * dim_;
            if (query + kQueriesAhead < item.queries)
                prefetch(from + kQueriesAhead * query_stride_, group_ * dim_ * int64_t(sizeof(float)));
            for (int64_t i = 0; i < group_ * dim_; i += kLanes)
                store(s.queries + row * dim_ + i, load<f32v>(from + i) * scale);
            for (const int64_t next = row + group_; row < next; ++row) {
                s.softs[row] = {kNoScore, 0.0f};
                if constexpr (kPaired<T>) s.query_units[row] = fix_query<T>(s.queries, row);
            }
        }
        std::memset(s.mixed, 0, size_t(rows * dim_) * sizeof(float));
        for (int64_t tile = item.first_tile; tile < item.last_tile; ++tile) {
            find<T>(unit, next_unit, tile, s.lines);
            if constexpr (kScaled<T>) {
                find_scales(item, head, tile, cache_.key_scales, s.scales);
                find_scales(item, head, tile, cache_.value_scales, s.scales + kTile);
            }
            if (item.part < 0) {
                attend<T>(item, tile, s, s.tile_softs, s.tile);
                merge_tile(item, tile, s, s.tile_softs, s.tile);
            } else {
                const int64_t part = part_of(item, head, item.tiles_before + tile - item.first_tile);
                attend<T>(item, tile, s, part_softs_.data() + part, part_mixed_ + part * dim_);
            }
        }
        if (item.part >= 0) {
            auto& waiting = waiting_[size_t(item.group * cache_.kv_heads + head)];
            if (waiting.fetch_sub(1, std::memory_order_acq_rel) > 1) return;
            for (int64_t tile = 0; tile < tiles_of_[size_t(item.group)]; ++tile) {
                const int64_t part = part_of(item, head, tile);
                merge_tile(item, item.first_tile - item.tiles_before + tile, s, part_softs_.data() + part,
                           part_mixed_ + part * dim_);
            }
        }
        for (int64_t query = 0, row = 0; query < item.queries; ++query) {
            float* to = out_ + ((item.row + query) * q_heads_ + head * group_) * dim_;
            for (const int64_t next = row + group_; row < next; ++row, to += dim_) {
                const f32v total = splat(s.softs[row].total);
                for (int64_t d = 0; d < dim_; d += kLanes) store(to + d, load<f32v>(s.mixed + row * dim_ + d) / total);
            }
        }
    }

    void merge_tile(const Item& item, int64_t tile, const Scratch& s, const Soft* softs, const float* mixed) const {
        for (int64_t query = 0, row = 0; query < item.queries; ++query) {
            const Span own = span(item, tile, query, 1);
            for (const int64_t next = row + group_; row < next; ++row)
                if (own.from < own.to) merge(s.softs[row], s.mixed + row * dim_, softs[row], mixed + row * dim_, dim_);
        }
    }

    int64_t part_of(const Item& item, int64_t head, int64_t tile) const {
        const int64_t rows = item.queries * group_;
        return item.part + (head * tiles_of_[size_t(item.group)] + tile) * rows;
    }

    // Where the keys or values (`pool`) [from, to) of a tile lie.
    template <class T>
    const void** find_rows(const Item& item, int64_t head, int64_t tile, const void* pool, int from, int to,
                           const void** lines) const {
        const int64_t* table = chunks_.tables + chunks_.table_starts[item.chunk];
        const int64_t size = cache_.block_size;
        for (int key = from; key < to;) {
            const int64_t position = tile * kTile + key, within = position % size;
            const int64_t slot = (head * cache_.blocks + table[position / size]) * size + within;
            const T* row = static_cast<const T*>(pool) + slot * dim_;
            const int64_t count = std::min<int64_t>(size - within, to - key);
            for (int64_t i = 0; i < count; ++i) *lines++ = row + i * dim_;
            key += int(count);
        }
        return lines;
    }

    // The scales of the keys or values that the item reads of a tile, where the tile has them; 0 up to the next vector.
    void find_scales(const Item& item, int64_t head, int64_t tile, const float* pool, float* scales) const {
        const int64_t* table = chunks_.tables + chunks_.table_starts[item.chunk];
        const int64_t size = cache_.block_size;
        const Span all = span(item, tile, 0, item.queries);
        for (int key = all.from / kLanes * kLanes; key < all.to;) {
            const int64_t position = tile * kTile + key, within = position % size;
            const int64_t count = std::min<int64_t>(size - within, all.to - key);
            std::memcpy(scales + key, pool + (head * cache_.blocks + table[position / size]) * size + within,
                        size_t(count) * sizeof(float));
            key += int(count);
        }
        for (int key = all.to; key % kLanes; ++key) scales[key] = 0.0f;
    }

    // See Scratch::lines. Keys are rounded up to whole vectors by the last one; after a unit's last tile comes the next unit's
    // first.
    template <class T>
    void find(int64_t unit, int64_t next_unit, int64_t tile, const void** lines) const {
        const Item* item = &items_[size_t(unit / cache_.kv_heads)];
        int64_t head = unit % cache_.kv_heads;
        const Span all = span(*item, tile, 0, item->queries);
        const int first = all.from / kLanes * kLanes;
        lines = find_rows<T>(*item, head, tile, cache_.keys, first, all.to, lines);
        for (int key = all.to; key % kLanes; ++key, ++lines) *lines = lines[-1];
        lines = find_rows<T>(*item, head, tile, cache_.values, first, all.to, lines);
        int ahead = 0;
        if (tile + 1 == item->last_tile && next_unit < runs_.back()) {
            item = &items_[size_t(next_unit / cache_.kv_heads)];
            head = next_unit % cache_.kv_heads;
            tile = item->first_tile - 1;
        }
        if (tile + 1 < item->last_tile) {
            const Span next = span(*item, tile + 1, 0, item->queries);
            const int from = next.from / kLanes * kLanes;
            ahead = std::min(kAhead, next.to - from);
            lines = find_rows<T>(*item, head, tile + 1, cache_.keys, from, from + ahead, lines);
        }
        for (; ahead < kAhead; ++ahead, ++lines) *lines = lines[-1];
    }

    // One tile: the softmax over it and the mixed values of each row that reads any of it.
    template <class T>
    void attend(const Item& item, int64_t tile, const Scratch& s, Soft* softs, float* mixed) const {
        const int64_t rows = item.queries * group_;
        for (int64_t query = 0, row = 0; query < item.queries; ++query)
            for (const int64_t next = row + group_; row < next; ++row) s.spans[row] = span(item, tile, query, 1);
        const int first = s.spans[0].from / kLanes * kLanes, to = s.spans[rows - 1].to;
        const int last = (to + kLanes - 1) / kLanes * kLanes;
        const T* const* keys = reinterpret_cast<const T* const*>(s.lines);
        const T* const* values = keys + (last - first);
        if (rows <= kRows) {
            kScoreFew<T>[size_t(rows - 1)]((last - first) / kLanes, keys, dim_, units<T>(s.queries), s.scores + first);
        } else {
            score(rows, keys, s, first, last);
        }
        for (int64_t row = 0; row < rows; row += kRows) {
            const Span block = block_span(s, row, rows);
            for (int64_t i = row; i < std::min(rows, row + kRows); ++i) {
                s.weight_units[i] = s.query_units[i];
                softs[i] = soften<T>(s.scores + i * kTile, s.spans[i], block.from / kLanes * kLanes,
                                     (block.to + kLanes - 1) / kLanes * kLanes, s.scales, s.scales + kTile,
                                     s.weight_units[i]);
            }
        }
        rows > kFewRows ? mix_packed(rows, values, s, first, to, mixed) : mix_few(rows, values, s, first, mixed);
        if constexpr (kPaired<T>) {
            for (int64_t row = 0; row < rows; ++row) {
                const f32v unit = splat(s.weight_units[row]);
                for (float *at = mixed + row * dim_, *end = at + dim_; at < end; at += kLanes)
                    store(at, __builtin_convertvector(load<i32v>(at), f32v) * unit);
            }
        }
    }

    // A row of queries to fixed point; rows come in order, and move together. Returns what a value of 1 stands for.
    template <class T>
    float fix_query(float* queries, int64_t row) const {
        f32v largest{}, sums{};
        const float* from = queries + row * dim_;
        for (int64_t i = 0; i < dim_; i += kLanes) {
            const f32v x = load<f32v>(from + i), size = max(x, -x);
            largest = max(size, largest);
            sums += size;
        }
        return fix<sizeof(T) == 1>(from, dim_, size_of<T>(max(largest), sum(sums)),
                                   reinterpret_cast<int16_t*>(queries) + row * dim_);
    }

    template <class T>
    static const Unit<T>* units(const float* from) {
        return reinterpret_cast<const Unit<T>*>(from);
    }

    template <class T>
    void mix_few(int64_t rows, const T* const* values, const Scratch& s, int first, float* mixed) const {
        constexpr int kSize = kUnitSize<T>;
        for (int64_t row = 0; row < rows; row += kRows) {
            const Span block = block_span(s, row, rows);
            const int start = block.from / kSize * kSize;
            const auto mix = kMix<T>[size_t(std::min<int64_t>(kRows, rows - row) - 1)];
            for (int from = start; from < block.to; from += kDepth)
                mix((std::min(kDepth, block.to - from) + kSize - 1) / kSize,
                    units<T>(s.scores + row * kTile) + from / kSize, values + (from - first), dim_, 0, mixed + row * dim_,
                    from == start);
        }
    }

    // What the rows of a block read, one with another.
    static Span block_span(const Scratch& s, int64_t row, int64_t rows) {
        return {s.spans[row].from, s.spans[std::min(rows, row + kRows) - 1].to};
    }

    template <class T>
    void score(int64_t rows, const T* const* keys, const Scratch& s, int first, int last) const {
        constexpr int kSize = kUnitSize<T>, kDeep = kDepth * kSize;
        auto* packed = reinterpret_cast<Unit<T>*>(s.panel);
        for (int panel = first; panel < last; panel += kPanel) {
            const int vectors = std::min(kPanel, last - panel) / kLanes;
            for (int64_t d = 0; d < dim_; d += kDeep) {
                const int64_t depth = std::min<int64_t>(kDeep, dim_ - d);
                for (int v = 0; v < vectors; ++v)
                    pack_keys(keys + (panel - first) + v * kLanes, d, depth, dim_, packed + v * kLanes);
                for (int64_t row = 0; row < rows; row += kRows) {
                    const int64_t count = std::min<int64_t>(kRows, rows - row);
                    const Span block = block_span(s, row, rows);
                    if (block.to <= panel || block.from >= panel + kPanel) continue;
                    const int needed = std::min(vectors, (block.to - panel + kLanes - 1) / kLanes);
                    kMultiply<T>[size_t((count - 1) * kVectors + needed - 1)](
                        depth / kSize, units<T>(s.queries) + (row * dim_ + d) / kSize, dim_ / kSize, packed,
                        s.scores + row * kTile + panel, kTile, d == 0);
                }
            }
        }
    }

    template <class T>
    void mix_packed(int64_t rows, const T* const* values, const Scratch& s, int first, int to, float* mixed) const {
        constexpr int kSize = kUnitSize<T>, kDeep = kDepth * kSize;
        auto* packed = reinterpret_cast<Unit<T>*>(s.panel);
        for (int64_t d = 0; d < dim_; d += kPanel) {
            const int vectors = int(std::min<int64_t>(kPanel, dim_ - d)) / kLanes;
            for (int key = first; key < to; key += kDeep) {
                const int end = std::min(to, key + kDeep);
                for (int k = key; k < end; k += kSize) {
                    for (int i = k; i < k + kSize; ++i)
                        prefetch(values[i - first + kAhead] + d, vectors * kLanes * int64_t(sizeof(T)));
                    for (int v = 0; v < vectors; ++v)
                        store(packed + (k - key) / kSize * kPanel + v * kLanes,
                              value_units(values, (k - first) / kSize, d + v * kLanes));
                }
                for (int64_t row = 0; row < rows; row += kRows) {
                    const int64_t count = std::min<int64_t>(kRows, rows - row);
                    const Span block = block_span(s, row, rows);
                    const int start = block.from / kSize * kSize;
                    const int from = std::max(start, key), needed = std::min(block.to, end) - from;
                    if (needed <= 0) continue;
                    kMultiply<T>[size_t((count - 1) * kVectors + vectors - 1)](
                        (needed + kSize - 1) / kSize, units<T>(s.scores + row * kTile) + from / kSize, kTile,
                        packed + (from - key) / kSize * kPanel, mixed + row * dim_ + d, dim_, from == start);
                }
            }
        }
    }

    const float* queries_;
    const int64_t query_stride_, q_heads_, group_, dim_, window_;
    const PagedCache& cache_;
    const RaggedChunks& chunks_;
    float* out_;
    std::vector<Item> items_;
    std::vector<int64_t> runs_;      // task t does units runs_[t] to runs_[t + 1] - 1
    std::vector<int64_t> tiles_of_;  // by group of pieces
    mutable std::vector<Soft> part_softs_;
    float* part_mixed_ = nullptr;
    mutable std::vector<std::atomic<int>> waiting_;  // by group and head: pieces that aren't done
};

}  // namespace

void paged_attention(const float* queries, int64_t query_stride, int64_t q_heads, const PagedCache& cache,
                     const RaggedChunks& chunks, int64_t window, float* out) {
    Attention(queries, query_stride, q_heads, cache, chunks, window, out).run();
}

}  // namespace qwire
